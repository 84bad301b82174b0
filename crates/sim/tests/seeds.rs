//! Seeds that everybody runs. A seed that ever failed is in `regress_seeds.txt`, with its story, and stays there.

use sim::{Counters, Options, simulate};

/// Runs seeds and returns what happened in all of them.
fn run(seeds: impl IntoIterator<Item = u64>, options: Options) -> Counters {
    let gentle = if options.gentle { " --gentle" } else { "" };
    let mut total = Counters::default();
    for seed in seeds {
        let report = simulate(seed, options);
        if let Some(failure) = report.failure {
            let story = report.story.join("\n  ");
            panic!("seed {seed}: {failure}\n  {story}\nreplay: cargo run -p sim -- --seed {seed}{gentle}");
        }
        total += report.counters;
    }
    total
}

/// Three hundred seeds, in tests of thirty so that they run side by side.
macro_rules! seeds {
    ($($name:ident: $seeds:expr;)*) => {$(
        #[test]
        fn $name() {
            let total = run($seeds, Options::default());
            // A run in which nothing went wrong proves nothing.
            assert!(total.commits > 1000 && total.crashes > 30 && total.takeovers > 5 && total.fenced > 0 && total.loads > 10, "{total:?}");
        }
    )*};
}

seeds! {
    seeds_0: 0..30;
    seeds_30: 30..60;
    seeds_60: 60..90;
    seeds_90: 90..120;
    seeds_120: 120..150;
    seeds_150: 150..180;
    seeds_180: 180..210;
    seeds_210: 210..240;
    seeds_240: 240..270;
    seeds_270: 270..300;
}

#[test]
fn seeds_that_once_failed() {
    let seeds = include_str!("regress_seeds.txt").lines().filter_map(|line| line.split_whitespace().next());
    run(
        seeds.filter(|seed| !seed.starts_with('#')).map(|seed| seed.parse().expect("a number")),
        Options::default(),
    );
}

#[test]
fn a_gentle_world_agrees_with_a_plain_map() {
    run(0..60, Options { gentle: true, ..Options::default() });
}

#[test]
fn a_seed_replays_to_the_last_line() {
    for seed in 0..10 {
        let twice = [(); 2].map(|()| simulate(seed, Options::default()).fingerprint);
        assert_eq!(twice[0], twice[1], "seed {seed}");
    }
    assert_ne!(simulate(1, Options::default()).fingerprint, simulate(2, Options::default()).fingerprint);
}

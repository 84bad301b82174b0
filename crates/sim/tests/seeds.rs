//! Seeds that everybody runs. A seed that ever failed is in `regress_seeds.txt` and stays there.

use sim::{Options, simulate};

fn run(seeds: impl IntoIterator<Item = u64>, options: Options) {
    let gentle = if options.gentle { " --gentle" } else { "" };
    for seed in seeds {
        let report = simulate(seed, options);
        if let Some(failure) = report.failure {
            let story = report.story.join("\n  ");
            panic!("seed {seed}: {failure}\n  {story}\nreplay: cargo run -p sim -- --seed {seed}{gentle}");
        }
    }
}

#[test]
fn a_gentle_world_agrees_with_a_plain_map() {
    run(0..100, Options { gentle: true, ..Options::default() });
}

#[test]
fn a_seed_replays_to_the_last_line() {
    let options = Options { gentle: true, ..Options::default() };
    for seed in 0..10 {
        assert_eq!(simulate(seed, options).fingerprint, simulate(seed, options).fingerprint, "seed {seed}");
    }
    assert_ne!(simulate(1, options).fingerprint, simulate(2, options).fingerprint);
}

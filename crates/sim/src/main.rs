//! Runs seeds: `sim --seed 8861 [--loud]` replays one, `sim --seeds 300 [--from 0]` a range.

use std::process::ExitCode;

use sim::{Counters, Options, Planted, Report, simulate};

const USAGE: &str = "usage: sim --seed N [--loud] | --seeds COUNT [--from N]   [--plant BUG] [--gentle]";

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("{message}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: Vec<String>) -> Result<bool, String> {
    let (mut from, mut count, mut options) = (0, None, Options::default());
    let mut arguments = arguments.into_iter();
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{name} needs a value"));
        match name.as_str() {
            "--seed" => (from, count) = (number(&value()?)?, Some(1)),
            "--seeds" => count = Some(number(&value()?)?),
            "--from" => from = number(&value()?)?,
            "--loud" => options.loud = true,
            "--gentle" => options.gentle = true,
            "--plant" => options.planted = Some(bug(&value()?)?),
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    let count = count.ok_or("which seeds?")?;
    // The engine's panics are findings; their messages are in the report.
    std::panic::set_hook(Box::new(move |panic| {
        if options.loud || count == 1 {
            eprintln!("{panic}")
        }
    }));
    let mut total = Counters::default();
    let mut failed = 0u64;
    for seed in from..from + count {
        let report = simulate(seed, options);
        total += report.counters;
        if report.failure.is_some() {
            failed += 1;
            print_failure(&report, options, count == 1);
        }
    }
    println!("{count} seeds from {from}, {failed} failed; {total:?}");
    Ok(failed == 0)
}

fn print_failure(report: &Report, options: Options, with_story: bool) {
    let plant = options.planted.map_or(String::new(), |bug| format!(" --plant {bug:?}"));
    let gentle = if options.gentle { " --gentle" } else { "" };
    if with_story {
        report.story.iter().for_each(|line| println!("  {line}"));
    }
    let failure = report.failure.as_deref().unwrap_or_default();
    println!(
        "seed {} FAILED: {failure}\n  replay: cargo run -p sim -- --seed {}{plant}{gentle}",
        report.seed, report.seed
    );
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number"))
}

fn bug(name: &str) -> Result<Planted, String> {
    let known = || Planted::ALL.map(|bug| format!("{bug:?}")).join(", ");
    Planted::ALL
        .into_iter()
        .find(|bug| format!("{bug:?}") == name)
        .ok_or_else(|| format!("no bug {name}; there are {}", known()))
}

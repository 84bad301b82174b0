//! The history in docs/performance.md, newest last: when, which commit, on what machine, beside what, and a table.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use crate::machine::{self, Load};

/// Appends a run to the history: its heading, the command, the table, and what is to be said about it. Returns the file.
pub fn append(
    heading: &str,
    command: &str,
    columns: &[&str],
    rows: &[impl AsRef<[String]>],
    remarks: &str,
) -> Result<PathBuf, String> {
    let file = acceptance::server::root().join("docs/performance.md");
    let wrong = |error: std::io::Error| format!("{}: {error}", file.display());
    let mut text = std::fs::read_to_string(&file).map_err(wrong)?;
    write!(text, "\n### {heading}\n\n`{command}`\n\n").expect(STRING);
    writeln!(text, "| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len())).expect(STRING);
    for row in rows {
        writeln!(text, "| {} |", row.as_ref().join(" | ")).expect(STRING);
    }
    if !remarks.is_empty() {
        writeln!(text, "\n{}", remarks.trim_end()).expect(STRING);
    }
    std::fs::write(&file, text).map_err(wrong)?;
    Ok(file)
}

/// When, which commit (and whether more was changed than it says), on what machine, beside what.
pub fn heading(load: &Load) -> String {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let date = date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    format!(
        "{}, commit {}, {}, load {}, others {:.2}",
        date.unwrap_or_default(),
        machine::commit(),
        machine::describe(),
        load.averages(),
        load.others
    )
}

/// The program's name as `make` has it, and its arguments.
pub fn command_line(name: &str) -> String {
    let quoted = |argument: String| if argument.contains(' ') { format!("'{argument}'") } else { argument };
    let arguments = std::env::args().skip(1).map(quoted);
    std::iter::once(name.to_owned()).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// Three digits that count.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 99.5 => format!("{value:.0}"),
        size if size >= 9.95 => format!("{value:.1}"),
        0.0 => "0".into(),
        _ => format!("{value:.2}"),
    }
}

/// What `!` means where it marks a row.
pub const BUSY: &str =
    "* `!`: more than half a processor was busy with something else; such a row proves little.";
const STRING: &str = "writing to a string does not fail";

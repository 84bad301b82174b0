//! The table: rows, ratios, what failed; printed, and kept in docs/performance.md.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use bench::history::{self, figure};
use bench::machine::{self, Load, Watch};

use crate::target::Target;

/// What of a unit is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Work done.
    More,
    /// Time, bytes, requests.
    Less,
}

/// What a row is about, before it is measured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The section's word.
    pub section: &'static str,
    /// What is measured.
    pub name: String,
    /// In what.
    pub unit: &'static str,
    /// Which way.
    pub better: Better,
    /// DESIGN section 7, column "first", in its words; may be empty.
    pub goal: &'static str,
}

/// One line of the table.
pub struct Row {
    subject: Subject,
    /// By the server's name, ours first.
    figures: Vec<(&'static str, Vec<f64>)>,
    load: Load,
    notes: Vec<String>,
    failures: Vec<String>,
}

impl Row {
    fn median_of(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|(of, _)| *of == name).and_then(|(_, figures)| median(figures))
    }

    /// How many times better ours is.
    fn ratio_to(&self, peer: &str) -> Option<f64> {
        let (ours, theirs) = (self.median_of(OURS)?, self.median_of(peer)?);
        let ratio = if self.subject.better == Better::More { ours / theirs } else { theirs / ours };
        ratio.is_finite().then_some(ratio)
    }

    fn spread(&self) -> Option<f64> {
        let (_, ours) = self.figures.iter().find(|(name, figures)| *name == OURS && figures.len() > 1)?;
        let (low, high) = ours.iter().fold((f64::MAX, f64::MIN), |(low, high), &x| (low.min(x), high.max(x)));
        Some((high - low) / median(ours)?)
    }
}

const OURS: &str = "cistern";
const PEERS: [&str; 2] = ["innodb", "myrocks"];

/// All rows so far.
pub struct Report {
    rows: Vec<Row>,
    pictures: Vec<PathBuf>,
    whole: Watch,
}

impl Report {
    /// An empty table.
    pub fn begin() -> Self {
        Self { rows: Vec::new(), pictures: Vec::new(), whole: Watch::begin() }
    }

    /// Measures rows, all by the same turns: every target has its own in every round, and another one begins each time.
    pub fn measure<const ROWS: usize>(
        &mut self,
        subjects: [Subject; ROWS],
        rounds: u32,
        targets: &[Target],
        mut act: impl FnMut(&Target, u32) -> Result<[f64; ROWS], String>,
    ) {
        let watch = Watch::begin();
        let mut turns: Vec<_> = targets.iter().map(|target| (target.name(), Vec::new())).collect();
        let mut failures = Vec::new();
        for round in 0..rounds {
            for turn in 0..targets.len() {
                let index = (turn + round as usize) % targets.len();
                match act(&targets[index], round) {
                    Ok(figures) => turns[index].1.push(figures),
                    Err(reason) => failures.push(format!("{}: {reason}", turns[index].0)),
                }
            }
        }
        let load = watch.end();
        for (row, subject) in subjects.into_iter().enumerate() {
            let figures = figures_of_row(row, &turns);
            self.push(subject, figures, load, Vec::new(), std::mem::take(&mut failures));
        }
    }

    /// A row that was measured elsewhere.
    pub fn push(
        &mut self,
        subject: Subject,
        figures: Vec<(&'static str, Vec<f64>)>,
        load: Load,
        notes: Vec<String>,
        failures: Vec<String>,
    ) {
        let row = Row { subject, figures, load, notes, failures };
        eprintln!("  {}", line(&cells(&row), &[0; COLUMNS.len()]).trim_end());
        row.failures.iter().for_each(|failure| eprintln!("  ! {failure}"));
        self.rows.push(row);
    }

    /// Says something about the row before.
    pub fn note(&mut self, note: String) {
        if let Some(row) = self.rows.last_mut() {
            row.notes.push(note);
        }
    }

    /// The row before is wrong.
    pub fn fail_last(&mut self, reason: String) {
        eprintln!("  ! {reason}");
        if let Some(row) = self.rows.last_mut() {
            row.failures.push(reason);
        }
    }

    /// Draws a section's figures (a file of comma-separated values) into target/bench-room/`name`.png.
    pub fn draw(&mut self, figures: &Path, name: &str) -> Result<(), String> {
        let root = acceptance::server::root();
        let picture = root.join("target/bench-room").join(format!("{name}.png"));
        let drawn = Command::new(root.join("tools/plot")).arg(figures).arg(&picture).status();
        if !drawn.map_err(|error| format!("tools/plot: {error}"))?.success() {
            return Err("tools/plot says why there is no picture".into());
        }
        self.pictures.push(picture);
        Ok(())
    }

    /// A section came to its end too early.
    pub fn fail(&mut self, section: &str, reason: String) {
        let subject = Subject {
            section: "",
            name: format!("{section}: not measured"),
            unit: "",
            better: Better::Less,
            goal: "",
        };
        self.push(subject, Vec::new(), Load::default(), Vec::new(), vec![reason]);
    }

    /// Something in it is wrong.
    pub fn failed(&self) -> bool {
        self.rows.iter().any(|row| !row.failures.is_empty())
    }

    /// For people: aligned columns, then remarks.
    pub fn table(&self) -> String {
        let cells: Vec<_> = self.rows.iter().map(cells).collect();
        let width = |column: usize| {
            let widths = cells.iter().map(|row| row[column].chars().count());
            widths.chain([COLUMNS[column].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..COLUMNS.len()).map(width).collect();
        let mut text = format!("{}\n\n", self.heading());
        text.push_str(line(&COLUMNS.map(str::to_owned), &widths).trim_end());
        for (row, cells) in self.rows.iter().zip(&cells) {
            write!(text, "\n{}", line(cells, &widths).trim_end()).expect(STRING);
            row.failures.iter().for_each(|failure| write!(text, "\n  ! {failure}").expect(STRING));
        }
        self.remarks().iter().for_each(|remark| write!(text, "\n{remark}").expect(STRING));
        for picture in &self.pictures {
            write!(text, "\ndrawn: {}", picture.display()).expect(STRING);
        }
        text
    }

    /// Appends the table to the history. Returns the file.
    pub fn record(&self, command: &str) -> Result<PathBuf, String> {
        let mut remarks = self.remarks().join("\n");
        let docs = acceptance::server::root().join("docs");
        for picture in &self.pictures {
            let stem = picture.file_stem().unwrap_or_default().to_string_lossy();
            let name = format!("performance/{stem}-{}.png", machine::commit().replace(' ', "-"));
            let kept = docs.join(&name);
            let copied = std::fs::create_dir_all(docs.join("performance"))
                .and_then(|()| std::fs::copy(picture, &kept).map(drop));
            copied.map_err(|error| format!("{}: {error}", kept.display()))?;
            write!(remarks, "\n\n![{stem}]({name})").expect(STRING);
        }
        let rows: Vec<_> = self.rows.iter().map(cells).collect();
        history::append(&self.heading(), command, &COLUMNS, &rows, remarks.trim_start())
    }

    fn heading(&self) -> String {
        history::heading(&self.whole.end())
    }

    fn remarks(&self) -> Vec<String> {
        let remark =
            |row: &Row, note: &String| format!("* {} · {}: {note}", row.subject.section, row.subject.name);
        let notes = self.rows.iter().flat_map(|row| row.notes.iter().map(move |note| remark(row, note)));
        let mut remarks: Vec<_> = notes.collect();
        if self.rows.iter().any(|row| row.load.is_busy()) {
            remarks.push(history::BUSY.into());
        }
        remarks
    }
}

/// What each server's turns say of one of the rows that they measured.
fn figures_of_row<const ROWS: usize>(
    row: usize,
    turns: &[(&'static str, Vec<[f64; ROWS]>)],
) -> Vec<(&'static str, Vec<f64>)> {
    turns.iter().map(|(name, turns)| (*name, turns.iter().map(|figures| figures[row]).collect())).collect()
}

const STRING: &str = "writing to a string does not fail";
const COLUMNS: [&str; 13] = [
    "section", "row", "unit", "cistern", "spread", "innodb", "ratio", "myrocks", "ratio", "goal", "n",
    "load", "others",
];

fn cells(row: &Row) -> [String; COLUMNS.len()] {
    let ratio = |peer| row.ratio_to(peer).map_or_else(String::new, |ratio| format!("{ratio:.2}×"));
    let median = |name| row.median_of(name).map_or_else(String::new, figure);
    let rounds = row.figures.first().map_or(0, |(_, figures)| figures.len());
    [
        row.subject.section.into(),
        row.subject.name.clone(),
        row.subject.unit.into(),
        median(OURS),
        row.spread().map_or_else(String::new, |spread| format!("{:.0} %", spread * 100.0)),
        median(PEERS[0]),
        ratio(PEERS[0]),
        median(PEERS[1]),
        ratio(PEERS[1]),
        row.subject.goal.into(),
        rounds.to_string(),
        row.load.averages(),
        row.load.beside(),
    ]
}

/// Numbers to the right, words to the left.
fn line(cells: &[String; COLUMNS.len()], widths: &[usize]) -> String {
    let mut line = String::new();
    for (index, (cell, &width)) in cells.iter().zip(widths).enumerate() {
        let space = " ".repeat(width.saturating_sub(cell.chars().count()));
        let left = index < 3 || index == 9;
        let (before, after) = if left { ("", space.as_str()) } else { (space.as_str(), "") };
        write!(line, "{before}{cell}{after}  ").expect(STRING);
    }
    line
}

/// The middle one; of two the mean.
pub fn median(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(better: Better, ours: &[f64], innodb: &[f64]) -> Row {
        let subject = Subject { section: "test", name: "row".into(), unit: "x", better, goal: "" };
        let figures = vec![("cistern", ours.to_vec()), ("innodb", innodb.to_vec())];
        Row { subject, figures, load: Load::default(), notes: Vec::new(), failures: Vec::new() }
    }

    #[test]
    fn a_ratio_above_one_says_that_ours_is_ahead_whatever_the_unit() {
        assert_eq!(row(Better::More, &[300.0], &[100.0]).ratio_to("innodb"), Some(3.0));
        assert_eq!(row(Better::Less, &[100.0], &[300.0]).ratio_to("innodb"), Some(3.0));
        assert_eq!(row(Better::Less, &[100.0], &[300.0]).ratio_to("myrocks"), None);
        // Nothing was measured, or nothing happened: no ratio rather than infinity.
        assert_eq!(row(Better::Less, &[], &[300.0]).ratio_to("innodb"), None);
        assert_eq!(row(Better::Less, &[0.0], &[300.0]).ratio_to("innodb"), None);
    }

    #[test]
    fn one_slow_round_changes_the_spread_and_not_the_figure() {
        let quiet = row(Better::Less, &[10.0, 11.0, 10.0], &[20.0]);
        let disturbed = row(Better::Less, &[10.0, 90.0, 10.0], &[20.0]);
        assert_eq!(quiet.median_of("cistern"), disturbed.median_of("cistern"));
        assert_eq!((quiet.spread(), disturbed.spread()), (Some(0.1), Some(8.0)));
    }

    #[test]
    fn rows_of_the_same_turns_do_not_mix() {
        // Transactions a second, and the processor time of one: ours does as many with half of it.
        let turns =
            [("cistern", vec![[100.0, 40.0], [120.0, 44.0], [110.0, 42.0]]), ("innodb", vec![[110.0, 84.0]])];
        let row_of = |better, figures: Vec<(_, Vec<f64>)>| row(better, &figures[0].1, &figures[1].1);
        let rate = row_of(Better::More, figures_of_row(0, &turns));
        let processor = row_of(Better::Less, figures_of_row(1, &turns));
        assert_eq!((rate.median_of("cistern"), rate.ratio_to("innodb")), (Some(110.0), Some(1.0)));
        assert_eq!((processor.median_of("cistern"), processor.ratio_to("innodb")), (Some(42.0), Some(2.0)));
        assert_eq!(processor.spread(), Some(4.0 / 42.0));
    }

    #[test]
    fn the_table_keeps_its_columns_and_names_its_failures() {
        let mut report = Report::begin();
        report.rows = vec![row(Better::More, &[1.0], &[2.0]), row(Better::More, &[12345.6], &[])];
        assert!(!report.failed());
        report.fail_last("innodb: it broke".into());
        assert!(report.failed());
        let table = report.table();
        assert!(table.contains("\n  ! innodb: it broke"), "{table}");
        let at = |needle: &str| {
            let line = table.lines().find(|line| line.contains(needle));
            line.and_then(|line| line.find(needle)).map(|start| start + needle.len())
        };
        assert_eq!(at("12346"), at("cistern"), "numbers end under the end of their head:\n{table}");
    }
}

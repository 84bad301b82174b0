//! What else the machine did while a row was measured.
//!
//! * The load average counts our own servers too, so beside it stands the processor time that neither this program nor
//!   anything it started has used: the neighbours', and what the hypervisor gave to others.

#![expect(clippy::disallowed_methods, reason = "what is looked at is the machine's own time")]

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Instant;

/// The machine during one row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Load average of the last minute, before.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// Processors that were busy with other things, on average.
    pub others: f64,
}

impl Load {
    /// Too much went on beside the row for its figures to prove much.
    pub fn is_busy(&self) -> bool {
        self.others > 0.5
    }

    /// Load averages, for a table.
    pub fn averages(&self) -> String {
        format!("{:.1} → {:.1}", self.before, self.after)
    }

    /// What was busy beside the row, for a table, and marked if that was too much.
    pub fn beside(&self) -> String {
        format!("{:.2}{}", self.others, if self.is_busy() { " !" } else { "" })
    }
}

/// Looks at the machine from its start to [`Watch::end`].
pub struct Watch {
    before: f64,
    busy: u64,
    own: u64,
    started: Instant,
}

impl Watch {
    /// Looks for the first time.
    pub fn begin() -> Self {
        Self { before: load_average(), busy: busy_ticks(), own: own_ticks(), started: Instant::now() }
    }

    /// Looks again.
    pub fn end(&self) -> Load {
        let busy = busy_ticks().saturating_sub(self.busy);
        let own = own_ticks().saturating_sub(self.own);
        let ticks = self.started.elapsed().as_secs_f64() * TICKS_A_SECOND;
        // Ticks are 10 ms, so a very short row may seem to have had more than there is.
        let others = (busy.saturating_sub(own) as f64 / ticks).min(processors() as f64);
        Load { before: self.before, after: load_average(), others }
    }
}

/// What Linux shows to programs, whatever its own clock is.
const TICKS_A_SECOND: f64 = 100.0;

fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Of all processors: everything that is neither idle nor waiting.
fn busy_ticks() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let numbers: Vec<u64> = numbers.filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests are part of user.
    [0, 1, 2, 5, 6, 7].iter().filter_map(|&index| numbers.get(index)).sum()
}

/// Of this program and everything it started, the dead included.
fn own_ticks() -> u64 {
    let mut parents = BTreeMap::new();
    let mut ticks = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(text) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name in brackets may hold anything; after it: state, parent, … and at 11 to 14 the times.
        let Some((_, rest)) = text.rsplit_once(") ") else { continue };
        let words: Vec<&str> = rest.split(' ').collect();
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        parents.insert(pid, number(1) as u32);
        ticks.insert(pid, (11..15).map(number).sum::<u64>());
    }
    let own = std::process::id();
    let is_ours = |mut pid: u32| {
        while pid != own {
            match parents.get(&pid) {
                Some(&parent) if parent != 0 => pid = parent,
                _ => return false,
            }
        }
        true
    };
    ticks.iter().filter(|(pid, _)| is_ours(**pid)).map(|(_, ticks)| ticks).sum()
}

/// The commit that is measured, and whether it has changes that are not in it.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").arg("-C").arg(acceptance::server::root()).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", "crates", "Cargo.lock"]);
    if changed.is_none_or(|files| files.is_empty()) { commit } else { commit + " with changes" }
}

/// Processors and memory, for whoever compares two machines.
pub fn describe() -> String {
    let first = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.trim_start_matches([' ', '\t', ':']).to_owned()
    };
    let kilobytes: f64 = first("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0.0);
    let model = first("/proc/cpuinfo", "model name");
    format!("{} processors ({model}), {:.0} GiB", processors(), kilobytes / (1 << 20) as f64)
}

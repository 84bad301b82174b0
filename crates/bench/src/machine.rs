//! What else the machine did while a row was measured.
//!
//! * The load average counts our own servers too, so beside it stands the processor time that neither this program nor
//!   anything it started has used: the neighbours', and what the hypervisor gave to others.

#![expect(clippy::disallowed_methods, reason = "what is looked at is the machine's own time")]

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

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

/// Keeps every processor from sleeping until it is dropped: what runs on them at the lowest policy there is (SCHED_IDLE) gives way to
/// everything else at once. In a virtual machine it takes long to wake one that has been halted, and a client and a server that take turns
/// pay that for every message.
pub struct Awake(Vec<Child>);

impl Awake {
    /// Begins.
    ///
    /// # Errors
    /// There is no `setpriv` (util-linux), or it can't start.
    pub fn begin() -> Result<Self, String> {
        let mut awake = Self(Vec::new());
        for _ in 0..processors() {
            // They end with this thread, however it ends.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "chrt", "--idle", "0", "sh", "-c", "while :; do :; done"]);
            awake.0.push(command.spawn().map_err(|error| format!("setpriv: {error}"))?);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for child in &mut self.0 {
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                eprintln!("bench: a process that kept a processor awake: {error}");
            }
        }
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

/// What a process has taken of the processors so far: all its threads, those that have ended too, without its children.
///
/// # Errors
/// It is gone.
pub fn processor_time(pid: i32) -> Result<Duration, String> {
    let file = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?;
    let stat = Stat::parse(&text).ok_or_else(|| format!("{file} says something else: {text}"))?;
    Ok(Duration::from_secs_f64(stat.own as f64 / TICKS_A_SECOND))
}

/// What a line of /proc/<pid>/stat says, times in ticks.
#[derive(Debug, PartialEq)]
struct Stat {
    parent: u32,
    own: u64,
    children: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name in brackets may hold anything; after it: state, parent, … and at 11 to 14 the times.
        let (_, rest) = text.rsplit_once(") ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        let number = |index: usize| words.get(index)?.parse::<u64>().ok();
        Some(Self {
            parent: number(1)? as u32,
            own: number(11)? + number(12)?,
            children: number(13)? + number(14)?,
        })
    }
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
        let Some(stat) = Stat::parse(&text) else { continue };
        parents.insert(pid, stat.parent);
        ticks.insert(pid, stat.own + stat.children);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_that_holds_anything() {
        let line = "4711 (a) b (c) S 12 4711 4711 0 -1 4194560 9 8 7 6 1500 250 30 4 20 0 42 0 99 1 2\n";
        assert_eq!(Stat::parse(line), Some(Stat { parent: 12, own: 1750, children: 34 }));
        assert_eq!(Stat::parse("4711 (mariadbd) S 12 4711"), None);
    }

    #[test]
    fn the_processor_time_of_a_process_holds_that_of_its_ended_threads() {
        let pid = std::process::id() as i32;
        let enough = processor_time(pid).unwrap() + Duration::from_millis(30);
        std::thread::spawn(move || while processor_time(pid).unwrap() < enough {}).join().unwrap();
        assert!(processor_time(pid).unwrap() >= enough);
        assert!(processor_time(0).unwrap_err().contains("/proc/0/stat"));
    }
}

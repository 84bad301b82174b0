//! How much memory the server may take, and how much it takes.
//!
//! * The operator sets one number for the whole process. What is not set is derived from the machine, or from the control group
//!   that the process lives in.
//! * What the server itself had when the engine started, and a share for its connections, is not the engine's to use.
//! * The engine counts what it takes, and never all of it: the allocator has holes, connections have sort buffers. So the process
//!   is measured as it runs, and decoded blocks make up for the difference.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};

use engine::MEMORY_BYTES_MIN;

/// Share of a machine's memory that one server takes for itself if nobody says otherwise; the rest is for others and for the page cache.
const OF_MACHINE: f64 = 0.5;
/// The same of a control group's limit, which was made for the server. A seventh beyond it is what the server may be over for a moment.
const OF_GROUP: f64 = 0.85;
/// Of the operator's number, for connections: their threads, sort buffers, network buffers.
const FOR_CONNECTIONS: f64 = 1.0 / 16.0;
/// Smaller numbers are taken for this one.
pub const BYTES_MIN: u64 = 128 << 20;

/// What the whole process may take: what the operator set, or (0) what the machine allows.
pub fn process_bytes(set: u64) -> u64 {
    let bytes = if set == 0 { of_machine(Path::new("/")) } else { set };
    bytes.max(BYTES_MIN)
}

/// What the engine may take of it, given what the process has taken before the engine is there.
pub fn engine_bytes(process_bytes: u64, taken: u64) -> usize {
    let connections = (process_bytes as f64 * FOR_CONNECTIONS) as u64;
    let rest = process_bytes.saturating_sub(taken).saturating_sub(connections);
    usize::try_from(rest).unwrap_or(usize::MAX).max(MEMORY_BYTES_MIN)
}

/// Bytes that the process has in memory now; 0 if nobody can tell.
pub fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib_of(&status, "VmRSS:").unwrap_or(0)
}

/// Measures the process again and again.
pub struct Scale {
    process_bytes: i64,
    /// What it took when it was last trimmed.
    trimmed_at: AtomicI64,
}

impl Scale {
    pub fn new(process_bytes: u64) -> Self {
        keep_large_allocations_apart(process_bytes);
        Self { process_bytes: process_bytes as i64, trimmed_at: AtomicI64::new(0) }
    }

    /// By how much the process is larger than it may be; negative: smaller. What the allocator holds and nobody uses is given back first.
    pub fn oversize(&self) -> i64 {
        let over = |resident: u64| resident as i64 - self.process_bytes;
        let before = over(resident_bytes());
        // Trimming walks the whole heap: again only if there is something new to be had.
        if before <= 0 || before < self.trimmed_at.load(Ordering::Relaxed) + self.process_bytes / 64 {
            self.trimmed_at.fetch_min(before, Ordering::Relaxed);
            return before;
        }
        trim();
        let after = over(resident_bytes());
        self.trimmed_at.store(after, Ordering::Relaxed);
        after
    }
}

/// What a machine or control group allows, in the files below `root`.
fn of_machine(root: &Path) -> u64 {
    let whole = memory_of_machine(root).unwrap_or(1 << 30);
    let machine = (whole as f64 * OF_MACHINE) as u64;
    match group_limits(root).into_iter().min() {
        Some(limit) if limit < whole => {
            machine.min((limit as f64 * OF_GROUP) as u64).max((limit as f64 * OF_MACHINE) as u64)
        }
        _ => machine,
    }
}

fn memory_of_machine(root: &Path) -> Option<u64> {
    kib_of(&fs::read_to_string(root.join("proc/meminfo")).ok()?, "MemTotal:")
}

/// The bytes that a line of such a file says.
fn kib_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// The limits of our group and of those around it, in either version of control groups. In a container the path may be another's view of
/// it; then our own group is the root of what we see.
fn group_limits(root: &Path) -> Vec<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            some if some.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mount = root.join(mount);
        let ours: PathBuf = mount.join(path.trim_start_matches('/'));
        let around = ours.ancestors().take_while(|group| group.starts_with(&mount));
        limits.extend(
            around.filter_map(|group| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok()),
        );
    }
    limits
}

unsafe extern "C" {
    fn mallopt(parameter: i32, value: i32) -> i32;
    fn malloc_trim(keep: usize) -> i32;
}

/// Whole ssts and wide windows are mapped each for itself and given back when they are freed. Left alone, glibc would after the first
/// of them keep such sizes in its heaps, where a block in their midst pins them for ever. With 1 GiB and more, what the server allocates
/// for a statement (2 MiB to sort) stays below both limits: mapped anew each time, clients that sort wait for each other in the
/// kernel. With less, what the heaps of all threads keep would be too large a share.
fn keep_large_allocations_apart(process_bytes: u64) {
    const M_TRIM_THRESHOLD: i32 = -1;
    const M_MMAP_THRESHOLD: i32 = -3;
    let apart = (process_bytes / 256).clamp(256 << 10, 4 << 20) as i32;
    // SAFETY: both take any number, from any thread.
    unsafe {
        mallopt(M_MMAP_THRESHOLD, apart);
        mallopt(M_TRIM_THRESHOLD, 2 * apart);
    }
}

fn trim() {
    // SAFETY: it takes any number, from any thread.
    unsafe { malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn machine(gib: u64, files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().expect("a directory");
        let meminfo = format!("MemTotal:       {} kB\nMemFree: 1 kB\n", gib << 20);
        for (name, text) in [("proc/meminfo", &*meminfo)].iter().chain(files) {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("it has one")).expect("made");
            fs::write(path, text).expect("written");
        }
        of_machine(root.path())
    }

    #[test]
    fn a_machine_gives_half_of_its_memory() {
        assert_eq!(machine(16, &[]), 8 * GIB);
        let unlimited = [
            ("proc/self/cgroup", "4:memory:/a\n0::/\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ];
        assert_eq!(machine(16, &unlimited), 8 * GIB);
    }

    #[test]
    fn a_control_group_gives_most_of_its_limit() {
        let expected = (2.0 * GIB as f64 * OF_GROUP) as u64;
        let second = [
            ("proc/self/cgroup", "0::/pod/ours\n"),
            ("sys/fs/cgroup/pod/memory.max", "2147483648\n"),
            ("sys/fs/cgroup/pod/ours/memory.max", "max\n"),
        ];
        assert_eq!(machine(16, &second), expected);
        let first = [
            ("proc/self/cgroup", "9:pids:/x\n4:cpu,memory:/pod\n"),
            ("sys/fs/cgroup/memory/pod/memory.limit_in_bytes", "2147483648\n"),
        ];
        assert_eq!(machine(16, &first), expected);
        // In a container: the path is the host's, the files are the container's.
        let inside =
            [("proc/self/cgroup", "0::/../host/pod\n"), ("sys/fs/cgroup/memory.max", "2147483648\n")];
        assert_eq!(machine(16, &inside), expected);
    }

    #[test]
    fn what_the_server_has_is_not_the_engines() {
        assert_eq!(engine_bytes(GIB, 64 << 20), (GIB - (64 << 20) - GIB / 16) as usize);
        assert_eq!(engine_bytes(BYTES_MIN, GIB), MEMORY_BYTES_MIN);
        assert!(resident_bytes() > 1 << 20);
    }
}

//! A disk of 3,000 operations and 125 MB a second: a file system in a file, whose loop device the kernel throttles (cgroup
//! v1, blkio) for the processes that are put into its group.
//!
//! * The limit holds for what those processes ask of this device, and for nothing else they do.
//! * It says that it has no volatile cache, so the kernel sends it no flushes: the throttle counts a flush as an operation (3,000 of
//!   `pwrite` and `fdatasync` were 6,000).
//! * It is probed before it is trusted: four writers and four readers past the page cache, and one with large blocks.
//! * Needs root. Mount, device, group and file end with the value.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Of reads and of writes, each.
pub const OPERATIONS: f64 = 3000.0;
/// Likewise.
pub const BYTES: f64 = 125e6;

/// A mounted file system with a limit.
pub struct LimitedDisk {
    image: PathBuf,
    mount: PathBuf,
    device: String,
    number: String,
    group: PathBuf,
}

impl LimitedDisk {
    /// Mounts an empty one of `bytes` on `mount`, which is made if it is missing.
    pub fn mount(name: &str, mount: &Path, image: &Path, bytes: u64) -> Result<Self, String> {
        let wrong = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
        fs::create_dir_all(mount).map_err(|error| wrong(mount, error))?;
        let file = fs::File::create(image).map_err(|error| wrong(image, error))?;
        file.set_len(bytes).map_err(|error| wrong(image, error))?;
        drop(file);
        run("mkfs.ext4", &["-q", "-F", &text(image)])?;
        let device = run("losetup", &["--direct-io=on", "--show", "-f", &text(image)])?.trim().to_owned();
        let group =
            PathBuf::from(format!("/sys/fs/cgroup/blkio/cistern-bench-{}-{name}", std::process::id()));
        let mut disk = Self {
            image: image.to_owned(),
            mount: mount.to_owned(),
            device: device.clone(),
            number: String::new(),
            group,
        };
        let block = PathBuf::from(device.replace("/dev/", "/sys/block/"));
        let (number, cache) = (block.join("dev"), block.join("queue/write_cache"));
        fs::write(&cache, "write through").map_err(|error| wrong(&cache, error))?;
        disk.number = fs::read_to_string(&number).map_err(|error| wrong(&number, error))?.trim().to_owned();
        run("mount", &[&device, &text(mount)])?;
        let lost = mount.join("lost+found"); // the servers take every directory for one of theirs
        fs::remove_dir(&lost).map_err(|error| wrong(&lost, error))?;
        fs::create_dir_all(&disk.group).map_err(|error| wrong(&disk.group, error))?;
        for (what, limit) in
            [("read_iops", OPERATIONS), ("write_iops", OPERATIONS), ("read_bps", BYTES), ("write_bps", BYTES)]
        {
            let file = disk.group.join(format!("blkio.throttle.{what}_device"));
            fs::write(&file, format!("{} {limit:.0}", disk.number)).map_err(|error| wrong(&file, error))?;
        }
        Ok(disk)
    }

    /// From now on `pid` is held to the limit.
    pub fn hold(&self, pid: i32) -> Result<(), String> {
        let file = self.group.join("cgroup.procs");
        fs::write(&file, pid.to_string()).map_err(|error| format!("{}: {error}", file.display()))
    }

    /// Operations that were served to the held processes so far.
    pub fn operations(&self) -> u64 {
        let text = fs::read_to_string(self.group.join("blkio.throttle.io_serviced")).unwrap_or_default();
        let beginning = format!("{} Total ", self.number);
        let line = text.lines().find_map(|line| line.strip_prefix(&beginning));
        line.and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    /// What the limit really is: written and read operations, and written bytes, a second.
    ///
    /// # Errors
    /// If it is not within a quarter of what it should be, which makes everything after it worthless.
    pub fn probe(&self) -> Result<String, String> {
        let file = text(&self.mount.join("probe"));
        let four = |command: &str| format!("for i in 0 1 2 3; do {command} & done; wait");
        let blocks = 2000;
        let write = four(&format!(
            "dd if=/dev/zero of={file} bs=4k count={blocks} seek=$((i*{blocks})) oflag=direct conv=notrunc status=none"
        ));
        let read = four(&format!(
            "dd if={file} of=/dev/zero bs=4k count={blocks} skip=$((i*{blocks})) iflag=direct status=none"
        ));
        let large =
            format!("dd if=/dev/zero of={file} bs=1M count=250 oflag=direct conv=notrunc status=none");
        let operations = 4.0 * f64::from(blocks);
        let written = operations / self.seconds_of(&write)?;
        let read = operations / self.seconds_of(&read)?;
        let bytes = 250.0 * f64::from(1 << 20) / self.seconds_of(&large)?;
        fs::remove_file(&file).map_err(|error| format!("{file}: {error}"))?;
        let said = format!("{written:.0} writes, {read:.0} reads, {:.0} MB a second", bytes / 1e6);
        let fits = |found: f64, limit: f64| (0.75..1.25).contains(&(found / limit));
        if fits(written, OPERATIONS) && fits(read, OPERATIONS) && fits(bytes, BYTES) {
            return Ok(said);
        }
        Err(format!("the throttled disk does not do what it should (3000, 3000, 125 MB): {said}"))
    }

    fn seconds_of(&self, command: &str) -> Result<f64, String> {
        let entered = format!("echo $$ > {} && {command}", text(&self.group.join("cgroup.procs")));
        let start = Instant::now();
        run("sh", &["-c", &entered])?;
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Drop for LimitedDisk {
    fn drop(&mut self) {
        for (program, argument) in [("umount", text(&self.mount)), ("losetup", format!("-d{}", self.device))]
        {
            if let Err(reason) = run(program, &[&argument]) {
                eprintln!("bench: {reason}");
            }
        }
        for gone in [fs::remove_dir(&self.group), fs::remove_file(&self.image)] {
            if let Err(error) = gone {
                eprintln!("bench: what is left of a throttled disk at {}: {error}", self.mount.display());
            }
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "{program} {}: {} (a throttled disk needs root, loop devices and cgroup v1)",
        arguments.join(" "),
        said.trim()
    ))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

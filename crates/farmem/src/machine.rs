//! How much memory the machine, or the control group that this process is in, has available, and the
//! descriptors of this process.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What may be used before something else suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Available {
    /// Bytes.
    pub(crate) bytes: u64,
    /// What sets the bound.
    pub(crate) bound: Bound,
}

/// What bounds the available memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// The machine's memory.
    Machine,
    /// A control group's limit.
    ControlGroup,
}

/// Lets this process have as many descriptors as the hard limit says. The soft one, mostly 1,024, is for
/// programs that use `select(2)`.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Up to the hard limit it is never refused.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// The available memory, or `None` where /proc cannot be read.
pub(crate) fn available() -> Option<Available> {
    let machine = meminfo_available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(match control_group_available() {
        Some(bytes) if bytes < machine => Available { bytes, bound: Bound::ControlGroup },
        _ => Available { bytes: machine, bound: Bound::Machine },
    })
}

/// What the tightest of this process's memory control groups leaves, or `None` without a limit.
pub(crate) fn control_group_available() -> Option<u64> {
    let memberships = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    control_groups(&memberships, &mounts).iter().filter_map(ControlGroup::available).min()
}

/// What [`control_group_available`] would say at any later time, without looking for the groups again.
pub(crate) fn control_group_watch() -> Option<impl Fn() -> Option<u64> + Send + Sync> {
    let memberships = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let groups = control_groups(&memberships, &mounts);
    Some(move || groups.iter().filter_map(ControlGroup::available).min())
}

fn meminfo_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

#[derive(Debug, PartialEq, Eq)]
struct ControlGroup {
    version: Version,
    directory: PathBuf,
}

/// The memory control groups that hold this process: its own and all above it.
fn control_groups(memberships: &str, mounts: &str) -> Vec<ControlGroup> {
    let mut groups = Vec::new();
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" => Version::V2,
            list if list.split(',').any(|name| name == "memory") => Version::V1,
            _ => continue,
        };
        let Some((root, mount)) = mount_of(mounts, version) else {
            continue;
        };
        // In a container the mount shows a part of the hierarchy: the path is below its root.
        let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        let own = Path::new(mount).join(below.strip_prefix("/").unwrap_or(below));
        for directory in own.ancestors().take_while(|directory| directory.starts_with(mount)) {
            groups.push(ControlGroup { version, directory: directory.to_owned() });
        }
    }
    groups
}

/// Root and mount point of the hierarchy that controls memory.
fn mount_of(mounts: &str, version: Version) -> Option<(&str, &str)> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut filesystem = filesystem.split(' ');
        let (kind, options) = (filesystem.next()?, filesystem.nth(1)?);
        let wanted = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
            Version::V2 => kind == "cgroup2",
        };
        let mut fields = mount.split(' ').skip(3);
        wanted.then_some((fields.next()?, fields.next()?))
    })
}

impl ControlGroup {
    fn available(&self) -> Option<u64> {
        let (limit, usage, inactive) = match self.version {
            Version::V1 => {
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            }
            Version::V2 => ("memory.max", "memory.current", "inactive_file"),
        };
        // "max" in version 2 is no number: no limit. Version 1 says about 2^63.
        let limit = self.number(limit)?;
        let used = self.number(usage)?;
        let statistics = fs::read_to_string(self.directory.join("memory.stat")).ok()?;
        // Cached files that nobody has used lately make room when asked.
        let cached = statistics
            .lines()
            .find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.directory.join(file)).ok()?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        let text = "MemTotal: 24683520 kB\nMemFree: 1 kB\nMemAvailable:   24380416 kB\n";
        assert_eq!(meminfo_available(text), Some(24_380_416 * 1024));
        assert_eq!(meminfo_available("MemTotal: 1 kB\n"), None);
        assert!(available().unwrap().bytes > 0);
    }

    fn directories(memberships: &str, mounts: &str) -> Vec<String> {
        let groups = control_groups(memberships, mounts);
        groups.iter().map(|group| group.directory.display().to_string()).collect()
    }

    #[test]
    fn version_2_and_all_groups_above() {
        let mounts = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        let found = directories("0::/user.slice/session-1.scope\n", mounts);
        let expected = [
            "/sys/fs/cgroup/user.slice/session-1.scope",
            "/sys/fs/cgroup/user.slice",
            "/sys/fs/cgroup",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn version_1_in_a_container_that_sees_a_part_of_the_hierarchy() {
        let mounts = "33 30 0:29 /docker/ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
                      34 30 0:30 /docker/ab /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n";
        let found = directories("4:memory:/docker/ab/inner\n1:cpu:/\n", mounts);
        assert_eq!(found, ["/sys/fs/cgroup/memory/inner", "/sys/fs/cgroup/memory"]);
    }
}

//! Which processes belong to the run, as /proc tells it.

use std::fs;

use rustix::process::Pid;

/// Longer than any real chain of parents; ends the walk should the chain change under it.
const GENERATIONS_MAX: usize = 4096;

/// Whether `pid` is a child of this process, or of one of its descendants.
pub(crate) fn is_descendant(pid: Pid) -> bool {
    let own = rustix::process::getpid();
    let mut current = Some(pid);
    for _ in 0..GENERATIONS_MAX {
        let Some(parent) = current.and_then(parent_of) else {
            return false;
        };
        if parent == own {
            return true;
        }
        current = Some(parent);
    }
    false
}

fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    // The name is in parentheses and may hold anything, so the fields are counted from its end.
    let (_, fields) = stat.rsplit_once(") ")?;
    Pid::from_raw(fields.split(' ').nth(1)?.parse().ok()?)
}

/// The children of this process that have not been waited for, orphans of the run among them.
pub(crate) fn children() -> Vec<Pid> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let mut children = Vec::new();
    for task in tasks.flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let pids = list
            .split_ascii_whitespace()
            .filter_map(|pid| pid.parse().ok());
        children.extend(pids.filter_map(Pid::from_raw));
    }
    children
}

/// The name that the kernel keeps of a process.
pub(crate) fn name_of(pid: Pid) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid())).ok()?;
    Some(name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_is_family_and_the_parent_is_not() {
        let mut child = Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        assert!(is_descendant(pid));
        assert!(children().contains(&pid));
        assert!(!is_descendant(rustix::process::getppid().unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_descendant(pid));
        assert!(!children().contains(&pid));
    }
}

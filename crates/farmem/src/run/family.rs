//! Which processes belong to the run, as /proc tells it.

use std::collections::HashSet;
use std::fs;

use rustix::process::Pid;

/// Longer than any real chain of parents; ends the walk should the chain change under it.
const GENERATIONS_MAX: usize = 4096;

/// Times that a line of ancestors is walked up anew because one of them ended meanwhile.
const WALKS_MAX: usize = 16;

/// Whether `pid` is a child of this process, or of one of its descendants.
pub(crate) fn is_descendant(pid: Pid) -> bool {
    (0..WALKS_MAX).find_map(|_| walk_up(pid)).unwrap_or(false)
}

/// `None` if an ancestor ended during the walk: its children have another parent then.
fn walk_up(pid: Pid) -> Option<bool> {
    let own = rustix::process::getpid();
    let mut current = pid;
    for _ in 0..GENERATIONS_MAX {
        match parent_of(current) {
            Some(parent) if parent == own => return Some(true),
            Some(parent) => current = parent,
            None if current == pid || current == Pid::INIT => return Some(false),
            None => return None,
        }
    }
    Some(false)
}

/// Whether there is such a process, waited for or not.
pub(crate) fn exists(pid: Pid) -> bool {
    parent_of(pid).is_some()
}

/// Memory of a process that is resident.
pub(crate) fn resident_bytes(pid: Pid) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{}/statm", pid.as_raw_pid())).ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    // The name is in parentheses and may hold anything, so the fields are counted from its end.
    let (_, fields) = stat.rsplit_once(") ")?;
    Pid::from_raw(fields.split(' ').nth(1)?.parse().ok()?)
}

/// The children of this process that have not been waited for, orphans of the run among them.
pub(crate) fn children() -> Vec<Pid> {
    children_of("self")
}

fn children_of(process: &str) -> Vec<Pid> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else {
        return Vec::new();
    };
    let mut children = Vec::new();
    for task in tasks.flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let pids = list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
        children.extend(pids.filter_map(Pid::from_raw));
    }
    children
}

/// The processes of the run without those that `is_ours` says, watchers and pagers, as the lists of
/// children have them. One that changes its parent at this moment may be missing.
pub(crate) fn relatives(is_ours: &impl Fn(Pid) -> bool) -> Vec<Pid> {
    let mut found: Vec<Pid> = Vec::new();
    let mut next = children();
    while let Some(pid) = next.pop() {
        if found.contains(&pid) || is_ours(pid) || is_named_as_ours(pid) {
            continue;
        }
        found.push(pid);
        next.extend(children_of(&pid.as_raw_pid().to_string()));
    }
    found
}

/// The watchers of the run: children of this process, and of subreapers below it.
pub(crate) fn watchers() -> Vec<Pid> {
    let mut found = Vec::new();
    let mut next = children();
    let mut known = HashSet::new();
    while let Some(pid) = next.pop() {
        if known.insert(pid) {
            found.extend(Some(pid).filter(|&pid| is_watcher(pid)));
            next.extend(children_of(&pid.as_raw_pid().to_string()));
        }
    }
    found
}

/// The anonymous memory of a process that is there; `None` if it has ended.
pub(crate) fn anonymous_bytes(pid: Pid) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{}/statm", pid.as_raw_pid())).ok()?;
    let mut pages = statm.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, of_files) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some(resident.saturating_sub(of_files) << 12)
}

/// All processes of the run: children of this process, their children, and so on.
pub(crate) fn descendants() -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Pid::from_raw).filter(|&pid| is_descendant(pid)).collect()
}

/// Whether missing pages of the process are reported to a userfaultfd.
pub(crate) fn has_userfaultfd(pid: Pid) -> bool {
    let areas = fs::read_to_string(format!("/proc/{}/smaps", pid.as_raw_pid()));
    areas.is_ok_and(|areas| reports_missing_pages(&areas))
}

fn reports_missing_pages(smaps: &str) -> bool {
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.flat_map(str::split_ascii_whitespace).any(|flag| flag == "um")
}

/// Whether the child, which may have ended, is or was a watcher.
pub(crate) fn is_watcher(pid: Pid) -> bool {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
    name.is_ok_and(|name| name.trim_end() == "farmem-watcher")
}

/// Whether the child, which may have ended, is or was a pager.
pub(crate) fn is_pager(pid: Pid) -> bool {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
    name.is_ok_and(|name| name.trim_end() == "farmem-pagerd")
}

/// Whether the process is a watcher or a pager: they share the memory of a program and give
/// themselves a name. One that has ended meanwhile counts as ours: nothing is to be done to it.
pub(crate) fn is_ours(pid: Pid) -> bool {
    is_named_as_ours(pid) || !is_descendant(pid)
}

fn is_named_as_ours(pid: Pid) -> bool {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
    name.is_ok_and(|name| name.starts_with("farmem-"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_is_family_and_the_parent_is_not() {
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        assert!(is_descendant(pid));
        assert!(children().contains(&pid));
        assert!(descendants().contains(&pid));
        assert!(relatives(&|_| false).contains(&pid));
        assert!(!relatives(&|ours| ours == pid).contains(&pid));
        assert!(!has_userfaultfd(pid));
        assert!(!is_descendant(rustix::process::getppid().unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_descendant(pid));
        assert!(!children().contains(&pid));
        assert!(!descendants().contains(&pid));
    }

    #[test]
    fn a_userfaultfd_is_seen_by_the_flag_of_an_area() {
        let area = "7f00-7f01 rw-p 00000000 00:00 0\nRss: 4 kB\nVmFlags: rd wr mr mw me ac";
        assert!(!reports_missing_pages(&format!("{area} sd\n")));
        assert!(reports_missing_pages(&format!("{area} sd\n{area} um sd\n")));
    }
}

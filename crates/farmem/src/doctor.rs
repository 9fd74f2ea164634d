//! `farmem doctor`: what of this machine `farmem run` needs, what was found, and how to change it.

use std::fs;
use std::io;
use std::process::ExitCode;

use anyhow::bail;
use farmem_vmem::{Probe, probe};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::artefacts::Artefacts;
use crate::cli::{DoctorOptions, OutputForm};
use crate::machine::{self, Bound};
use crate::size::Size;
use crate::{standard_error, standard_output, table};

/// The first kernel with UFFDIO_MOVE.
const KERNEL_NEEDED: (u32, u32) = (6, 8);
/// The first kernel whose UFFDIO_MOVE treats pages in swap right in all cases: before, moving a
/// page that was on its way in from swap could lose it.
const KERNEL_FOR_SWAP: (u32, u32) = (6, 16);
/// Adoption splits mappings at most this often; the kernel's default leaves room for as many.
const MAPPINGS_NEEDED: u64 = 65_530;
/// A process of the tree holds two userfaultfds, a connection, a stats page and two pidfds at the supervisor.
const DESCRIPTORS_NEEDED: u64 = 1024;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// `farmem run` works, though not as well as it could.
    Warn,
    /// `farmem run` cannot work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
struct Row {
    check: &'static str,
    status: Status,
    found: String,
    needed: String,
    /// What to do; empty where nothing is to be done.
    remedy: String,
}

impl Row {
    fn new(check: &'static str, found: impl Into<String>, needed: impl Into<String>) -> Self {
        let (found, needed) = (found.into(), needed.into());
        Self { check, status: Status::Ok, found, needed, remedy: String::new() }
    }

    fn or(mut self, good: bool, otherwise: Status, remedy: impl Into<String>) -> Self {
        if !good {
            self.status = otherwise;
            self.remedy = remedy.into();
        }
        self
    }
}

/// Prints all findings. The status is 1 if `farmem run` cannot work.
pub(crate) fn doctor(options: &DoctorOptions) -> anyhow::Result<ExitCode> {
    let rows = examine();
    let works = rows.iter().all(|row| row.status != Status::Fail);
    match options.output.form() {
        OutputForm::Json => {
            let findings = serde_json::json!({ "works": works, "checks": rows });
            standard_output::write_json(&findings)?;
        }
        OutputForm::Table => standard_output::write(in_words(&rows))?,
    }
    if !works {
        standard_error::tell("`farmem run` cannot work on this machine; see the remedies");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses to go on where a program could not be paged.
///
/// # Errors
/// All that is missing, each with its remedy.
pub(crate) fn require_for_run() -> anyhow::Result<()> {
    let rows = decisive(&probe());
    let failed: Vec<&Row> = rows.iter().filter(|row| row.status == Status::Fail).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let reasons: Vec<String> = failed
        .iter()
        .map(|row| {
            format!("{}: found {}, needed {}; {}", row.check, row.found, row.needed, row.remedy)
        })
        .collect();
    bail!(
        "programs cannot be paged on this machine (see `farmem doctor`)\n  {}",
        reasons.join("\n  ")
    )
}

fn in_words(rows: &[Row]) -> String {
    let cells: Vec<[String; 4]> = rows
        .iter()
        .map(|row| {
            let status = match row.status {
                Status::Ok => "ok",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            [status.to_owned(), row.check.to_owned(), row.found.clone(), row.needed.clone()]
        })
        .collect();
    let mut text = table::lay_out(["STATUS", "CHECK", "FOUND", "NEEDED"], &cells);
    for row in rows.iter().filter(|row| row.status != Status::Ok) {
        text.push_str(&format!("\n{}: {}\n", row.check, row.remedy));
    }
    text
}

fn examine() -> Vec<Row> {
    let probe = probe();
    let mut rows = decisive(&probe);
    rows.push(artefacts());
    rows.extend(informative(&probe));
    rows
}

/// What decides whether anything can be paged.
fn decisive(probe: &Probe) -> Vec<Row> {
    let (release, version) = kernel();
    let too_old = format!(
        "boot Linux {}.{} or newer (Debian 12: linux-image-amd64 from bookworm-backports)",
        KERNEL_NEEDED.0, KERNEL_NEEDED.1
    );
    let needed = format!("{}.{} or newer", KERNEL_NEEDED.0, KERNEL_NEEDED.1);
    let new_enough = version >= KERNEL_NEEDED;
    let lacking: Vec<&str> =
        probe.features.iter().filter(|(_, found)| !found).map(|&(name, _)| name).collect();
    let features = if probe.features.is_empty() {
        "unknown".to_owned()
    } else if lacking.is_empty() {
        "all".to_owned()
    } else {
        format!("no {}", lacking.join(", "))
    };
    vec![
        Row::new("kernel", release, needed).or(new_enough, Status::Fail, too_old.clone()),
        permission(probe),
        Row::new("userfaultfd features", features, "MOVE and the events").or(
            lacking.is_empty(),
            Status::Fail,
            too_old,
        ),
        paging(probe),
    ]
}

fn permission(probe: &Probe) -> Row {
    let describe = |route: &io::Result<()>| match route {
        Ok(()) => "granted".to_owned(),
        Err(error) => error.to_string(),
    };
    let found =
        format!("device {}, system call {}", describe(&probe.device), describe(&probe.syscall));
    Row::new("userfaultfd permission", found, "either of them").or(
        probe.device.is_ok() || probe.syscall.is_ok(),
        Status::Fail,
        "give this user read and write permission on /dev/userfaultfd, for example by a udev rule \
         KERNEL==\"userfaultfd\", GROUP=\"farmem\", MODE=\"0660\"; in a container add --device \
         /dev/userfaultfd",
    )
}

fn paging(probe: &Probe) -> Row {
    let found = match &probe.paging {
        Ok(()) => "granted".to_owned(),
        Err(error) => error.to_string(),
    };
    Row::new("paging with fork events", found, "CAP_SYS_PTRACE").or(
        probe.paging.is_ok(),
        Status::Fail,
        "run as root or with the capability CAP_SYS_PTRACE (capsh --caps=cap_sys_ptrace+eip; in a \
         container --cap-add SYS_PTRACE): without it a program that forks would lose pages",
    )
}

fn artefacts() -> Row {
    match Artefacts::find() {
        Ok(artefacts) => {
            let folder = artefacts.preload.parent().map(|folder| folder.display().to_string());
            Row::new("preload library and pager", folder.unwrap_or_default(), "beside farmem")
        }
        Err(error) => Row::new("preload library and pager", "not usable", "beside farmem").or(
            false,
            Status::Fail,
            error.to_string(),
        ),
    }
}

/// What bounds how well, or how much.
fn informative(probe: &Probe) -> Vec<Row> {
    let mut rows = vec![
        unprivileged(probe),
        real_time(),
        mappings(),
        limit("locked memory (RLIMIT_MEMLOCK)", Resource::Memlock, 0, |bytes| {
            Size(bytes).to_string()
        }),
        limit("descriptors (hard RLIMIT_NOFILE)", Resource::Nofile, DESCRIPTORS_NEEDED, |count| {
            count.to_string()
        }),
        io_uring(probe),
        swap(),
        huge_pages(),
        ptrace_scope(),
    ];
    rows.extend(memory());
    rows
}

fn unprivileged(probe: &Probe) -> Row {
    let setting = setting("/proc/sys/vm/unprivileged_userfaultfd");
    let found = setting.unwrap_or_else(|| "unknown".to_owned());
    // Decides nothing by itself: it is the reason where the permission above is missing.
    Row::new("vm.unprivileged_userfaultfd", found, "1, or one of the permissions above").or(
        probe.paging.is_ok(),
        Status::Warn,
        "the permissions above are enough and to be preferred to sysctl \
         vm.unprivileged_userfaultfd=1",
    )
}

fn real_time() -> Row {
    // Tried in a thread that ends with it.
    let granted = std::thread::spawn(farmem_vmem::be_real_time).join().unwrap_or(false);
    let found = if granted { "granted" } else { "not granted" };
    Row::new("real-time priority", found, "CAP_SYS_NICE, or RLIMIT_RTPRIO of 1").or(
        granted,
        Status::Warn,
        "give this user a line `USER - rtprio 1` in /etc/security/limits.conf (a service \
         LimitRTPRIO=1, a container --ulimit rtprio=1), or the capability CAP_SYS_NICE: without it \
         the pager and the thread that waits for it wake each other on two processors, and a \
         fault takes three times as long",
    )
}

fn mappings() -> Row {
    let count = setting("/proc/sys/vm/max_map_count").and_then(|text| text.parse().ok());
    Row::new(
        "mappings (vm.max_map_count)",
        count.map_or("unknown".to_owned(), |count: u64| count.to_string()),
        format!("{MAPPINGS_NEEDED} or more"),
    )
    .or(
        count.is_some_and(|count| count >= MAPPINGS_NEEDED),
        Status::Warn,
        "sysctl -w vm.max_map_count=262144: registering memory splits mappings",
    )
}

fn limit(
    check: &'static str,
    resource: Resource,
    needed: u64,
    describe: impl Fn(u64) -> String,
) -> Row {
    // Soft limits are raised to the hard ones.
    let maximum = getrlimit(resource).maximum;
    let found = maximum.map_or("unlimited".to_owned(), &describe);
    let needed_text = if needed == 0 { "any".to_owned() } else { describe(needed) };
    Row::new(check, found, needed_text).or(
        maximum.is_none_or(|maximum| maximum >= needed),
        Status::Warn,
        format!("raise the hard limit, for example by `ulimit -Hn {needed}` as root"),
    )
}

fn io_uring(probe: &Probe) -> Row {
    let found = match &probe.io_uring {
        Ok(()) => "available".to_owned(),
        Err(error) => format!("not available: {error}"),
    };
    Row::new("io_uring", found, "nothing: it is not used yet")
}

fn swap() -> Row {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let on = swaps.lines().count() > 1;
    let (_, version) = kernel();
    let (major, minor) = KERNEL_FOR_SWAP;
    Row::new("swap", if on { "on" } else { "off" }, format!("off, or Linux {major}.{minor}")).or(
        !on || version >= KERNEL_FOR_SWAP,
        Status::Warn,
        format!(
            "swapoff -a, or boot Linux {major}.{minor} or newer: earlier ones have faults in \
                 UFFDIO_MOVE on pages in swap"
        ),
    )
}

fn huge_pages() -> Row {
    let modes = setting("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = modes.split(['[', ']']).nth(1).unwrap_or("none").to_owned();
    // Moving a page out of a huge page splits it first, once.
    Row::new("transparent huge pages", chosen, "any")
}

fn ptrace_scope() -> Row {
    let scope = setting("/proc/sys/kernel/yama/ptrace_scope");
    let restricted = scope.as_deref() == Some("3");
    Row::new("ptrace scope", scope.unwrap_or_else(|| "no Yama".to_owned()), "below 3").or(
        !restricted,
        Status::Warn,
        "kernel.yama.ptrace_scope=3 forbids what the pager asks of its program; it can only be \
         lowered by a reboot",
    )
}

fn memory() -> Option<Row> {
    let available = machine::available()?;
    let bound = match available.bound {
        Bound::Machine => "of the machine",
        Bound::ControlGroup => "of the control group",
    };
    let found = format!("{} {bound}", Size(available.bytes));
    Some(Row::new("available memory", found, "more than 16 MiB"))
}

fn kernel() -> (String, (u32, u32)) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let version = parse_version(&release).unwrap_or((0, 0));
    (release, version)
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn setting(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases() {
        for (release, version) in [
            ("6.18.44-fc", Some((6, 18))),
            ("6.8.0-31-generic", Some((6, 8))),
            ("5.10", Some((5, 10))),
            ("next", None),
        ] {
            assert_eq!(parse_version(release), version, "{release}");
        }
    }

    fn denied() -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn one_way_to_a_userfaultfd_is_enough_and_none_is_a_failure_with_a_remedy() {
        let mut probe = probe();
        (probe.device, probe.syscall) = (Ok(()), denied());
        assert_eq!(permission(&probe).status, Status::Ok);
        probe.device = denied();
        let row = permission(&probe);
        assert_eq!(row.status, Status::Fail);
        assert!(row.remedy.contains("/dev/userfaultfd"));
    }

    #[test]
    fn a_kernel_without_a_feature_fails_and_names_it() {
        let mut probe = probe();
        probe.features = vec![("MOVE", false), ("EVENT_FORK", true)];
        let rows = decisive(&probe);
        let row = rows.iter().find(|row| row.check == "userfaultfd features").unwrap();
        assert_eq!((row.status, row.found.as_str()), (Status::Fail, "no MOVE"));
    }
}

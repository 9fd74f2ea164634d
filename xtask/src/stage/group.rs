//! Control groups (version 1) in which a program and all who work for it run: one that counts
//! processor time, and one that limits memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

const CPUACCT: &str = "/sys/fs/cgroup/cpuacct";
const MEMORY: &str = "/sys/fs/cgroup/memory";

/// A control group of ours; everything in it is killed when it goes.
#[derive(Debug)]
pub(crate) struct Group {
    folder: PathBuf,
}

impl Group {
    /// A group that counts the processor time of everything that runs in it.
    pub(crate) fn counting() -> anyhow::Result<Self> {
        Self::create(CPUACCT)
    }

    /// A group whose memory is limited.
    pub(crate) fn limited(limit_bytes: u64) -> anyhow::Result<Self> {
        let group = Self::create(MEMORY)?;
        let file = group.folder.join("memory.limit_in_bytes");
        fs::write(&file, limit_bytes.to_string())
            .with_context(|| format!("write {limit_bytes} to {}", file.display()))?;
        Ok(group)
    }

    fn create(hierarchy: &str) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("farmem-xtask-{}-{number}", std::process::id());
        let folder = Path::new(hierarchy).join(name);
        fs::create_dir(&folder).with_context(|| {
            format!("create the control group {} (needs root and version 1)", folder.display())
        })?;
        Ok(Self { folder })
    }

    /// The file that holds the processor time of the group in nanoseconds.
    pub(crate) fn cpu_file(&self) -> PathBuf {
        self.folder.join("cpuacct.usage")
    }

    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let file = self.cpu_file();
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(text.trim().parse::<u64>().context("cpuacct.usage")? as f64 / 1e9)
    }

    pub(crate) fn processes(&self) -> Vec<i32> {
        let list = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills what is in the group now.
    pub(crate) fn kill(&self) {
        for process in self.processes().into_iter().filter_map(Pid::from_raw) {
            // One that just ended needs no killing.
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(10);
        let started = Instant::now();
        while fs::remove_dir(&self.folder).is_err() {
            if started.elapsed() > PATIENCE {
                eprintln!("warning: {} could not be removed", self.folder.display());
                return;
            }
            self.kill();
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A command that runs `program` inside `groups`: a shell enters them and then becomes it.
pub(crate) fn command_inside(groups: &[&Group], program: &[String]) -> anyhow::Result<Command> {
    if program.is_empty() {
        bail!("no program to run");
    }
    let mut script = String::new();
    for group in groups {
        script += &format!("echo $$ > '{}/cgroup.procs' && ", group.folder.display());
    }
    let mut command = Command::new("sh");
    command.arg("-c").arg(script + "exec \"$@\"").arg("sh").args(program);
    Ok(command)
}

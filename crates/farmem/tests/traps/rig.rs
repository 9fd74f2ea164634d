//! The farmem that was built, in a folder of its own with the programs that run under it.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::Value;

/// What the programs may keep, of the 128 MiB that they use.
pub(crate) const LIMIT: &str = "32MiB";

/// Each takes a few seconds on two idle processors. Who is not ready after this long hangs.
const PATIENCE: Duration = Duration::from_secs(100);

/// The files that farmem consists of.
const SHIPPED: [&str; 3] = ["farmem", "libfarmem_preload.so", "farmem-pagerd"];

/// Where they are, and room for what a test makes.
#[derive(Debug)]
pub(crate) struct Rig {
    artefacts: PathBuf,
    folder: tempfile::TempDir,
}

/// How a run went.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// The file of `--stats`, or null.
    pub(crate) stats: Value,
}

/// A `farmem run` under way.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    pub(crate) child: Child,
    rig: &'a Rig,
}

impl Rig {
    /// Nothing where farmem has not been built or cannot page, which is a failure under CI.
    pub(crate) fn new() -> Option<Self> {
        let artefacts = match std::env::var_os("FARMEM_ARTEFACTS") {
            Some(folder) => PathBuf::from(folder),
            None => Path::new(env!("CARGO_BIN_EXE_farmem")).parent()?.to_owned(),
        };
        let folder = tempfile::tempdir().unwrap();
        let rig = Self { artefacts, folder };
        let absent: Vec<&str> =
            SHIPPED.into_iter().filter(|name| !rig.artefacts.join(name).is_file()).collect();
        if !absent.is_empty() {
            let names = absent.join(", ");
            return skipped(&format!("no {names} beside the tests: `cargo xtask build` first"));
        }
        let doctor = rig.farmem().arg("doctor").output().unwrap();
        if !doctor.status.success() {
            return skipped(
                "`farmem doctor` says that nothing can be paged here, or not with these files",
            );
        }
        // Plain `cargo build` makes a pager that needs a dynamic loader, which farmem refuses.
        let trial = rig.farmem().args(["run", "--quiet", "true"]).output().unwrap();
        if !trial.status.success() {
            let reason = String::from_utf8_lossy(&trial.stderr);
            return skipped(&format!("{}: `cargo xtask build` first", reason.trim_end()));
        }
        Some(rig)
    }

    /// A file or folder of this test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `farmem`, with nothing of the caller's farmem variables.
    pub(crate) fn farmem(&self) -> Command {
        let mut command = Command::new(self.artefacts.join("farmem"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FARMEM_") {
                command.env_remove(name);
            }
        }
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Compiles a program of `programs/`.
    pub(crate) fn compile(&self, name: &str) -> PathBuf {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traps/programs");
        let program = self.path(name);
        let compiler = Command::new("cc")
            .args(["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .arg(&program)
            .arg(sources.join(name).with_extension("c"))
            .output()
            .expect("a C compiler: apt-get install gcc libc6-dev");
        let said = String::from_utf8_lossy(&compiler.stderr);
        assert!(compiler.status.success(), "cc {name}.c: {said}");
        program
    }

    /// A program of the workloads, which `cargo build --workspace` puts beside farmem.
    pub(crate) fn workload(&self, name: &str) -> Option<PathBuf> {
        let program = self.artefacts.join(name);
        if program.is_file() {
            return Some(program);
        }
        skipped(&format!("no {name} beside farmem: `cargo build --workspace` first"))
    }

    /// Starts `farmem run` of a program in a process group of its own, its output in files.
    pub(crate) fn start(
        &self,
        options: &[&str],
        program: &Path,
        arguments: &[&str],
    ) -> Running<'_> {
        use std::os::unix::process::CommandExt;
        let mut command = self.farmem();
        command.args(["run", "--quiet", "--stats", "stats"]);
        command.args(options).arg("--").arg(program).args(arguments);
        command.stdout(File::create(self.path("stdout")).unwrap());
        command.stderr(File::create(self.path("stderr")).unwrap());
        Running { child: command.process_group(0).spawn().unwrap(), rig: self }
    }

    /// Runs a program to its end.
    pub(crate) fn run(&self, options: &[&str], program: &Path, arguments: &[&str]) -> Outcome {
        self.start(options, program, arguments).end(PATIENCE)
    }
}

impl Running<'_> {
    /// Waits for the end, which has to come in time.
    pub(crate) fn end(&mut self, limit: Duration) -> Outcome {
        let ended = ends_within(pid_of(&self.child), limit);
        if !ended {
            let _ = kill_process_group(pid_of(&self.child), Signal::KILL);
        }
        let status = self.child.wait().unwrap();
        let text = |name| fs::read_to_string(self.rig.path(name)).unwrap_or_default();
        let outcome = Outcome {
            status,
            stdout: text("stdout"),
            stderr: text("stderr"),
            stats: serde_json::from_str(&text("stats")).unwrap_or_default(),
        };
        assert!(ended, "still running after {limit:?}: {outcome:?}");
        outcome
    }

    /// Waits for a line of the program's output that starts like this.
    pub(crate) fn says(&mut self, start: &str) -> String {
        self.says_line(&|line| line.starts_with(start), start)
    }

    /// Waits for a line that ends like this.
    pub(crate) fn says_with(&mut self, end: &str) -> String {
        self.says_line(&|line| line.trim_end().ends_with(end), end)
    }

    fn says_line(&mut self, is_it: &dyn Fn(&str) -> bool, what: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let said = fs::read_to_string(self.rig.path("stdout")).unwrap();
            let mut whole = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            if let Some(line) = whole.find(|line| is_it(line)) {
                return line.to_owned();
            }
            let ended = self.child.try_wait().unwrap();
            let said = fs::read_to_string(self.rig.path("stderr")).unwrap();
            assert!(ended.is_none(), "ended with {ended:?}: {said}");
            assert!(Instant::now() < until, "never said {what}: {said}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running<'_> {
    /// Leaves nothing of a test that failed.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process_group(pid_of(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Outcome {
    /// The program found what it expected, while pages really went out.
    #[track_caller]
    pub(crate) fn is_right(&self) {
        assert!(self.status.success(), "{self:?}");
        self.has_paged();
    }

    /// It was farmem that stopped the program, for this reason.
    #[track_caller]
    pub(crate) fn was_stopped(&self, reasons: &[&str]) {
        assert_eq!(self.status.code(), Some(125), "{self:?}");
        assert_eq!(self.status.signal(), None);
        for reason in reasons {
            assert!(self.stderr.contains(reason), "no `{reason}` in {self:?}");
        }
        assert!(!self.stderr.contains("wrong"), "{self:?}");
    }

    /// Pages went out: without that a test says nothing.
    #[track_caller]
    pub(crate) fn has_paged(&self) {
        assert!(self.stats["evicted_pages"].as_u64() > Some(0), "{self:?}");
    }
}

pub(crate) fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Waits for a process to end, whoever's child it is.
pub(crate) fn ends_within(pid: Pid, limit: Duration) -> bool {
    // A process that is gone has no descriptor.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap() > 0
}

/// The trap test of one program: it exits with 0 after it found every byte that it expected.
pub(crate) fn trap(name: &str) {
    if let Some(rig) = Rig::new() {
        let program = rig.compile(name);
        rig.run(&["--local", LIMIT], &program, &[]).is_right();
    }
}

/// Tells the reader of the output; `cargo xtask ci` counts these lines.
#[expect(clippy::print_stdout, reason = "how tests tell that they were skipped")]
pub(crate) fn skipped<T>(reason: &str) -> Option<T> {
    assert!(std::env::var_os("CI").is_none(), "cannot test under CI: {reason}");
    println!("skipped: {reason}");
    None
}

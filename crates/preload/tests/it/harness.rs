//! Stands in for `farmem run`: builds the artefacts, listens on a control socket, starts programs
//! with the library under them, and knows the watchers and pagers that belong to them.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    listen, recv, send, socket_with,
};

/// For whatever is waited for: far above what it takes on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const MIB: u64 = 1 << 20;

/// The files under test: as FARMEM_TEST_PRELOAD and FARMEM_TEST_PAGER name them, or else built here.
pub(crate) struct Artefacts {
    pub(crate) preload: PathBuf,
    /// A pager that reports and pages nothing: the example `runtime_probe` of farmem-pagerd.
    pub(crate) probe: PathBuf,
}

/// `None`, with a printed reason, where they are not there and cannot be built.
pub(crate) fn artefacts() -> Option<&'static Artefacts> {
    static ARTEFACTS: OnceLock<Option<Artefacts>> = OnceLock::new();
    ARTEFACTS.get_or_init(find_or_build).as_ref()
}

fn find_or_build() -> Option<Artefacts> {
    // SAFETY: takes numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    let named = |variable| env::var_os(variable).map(PathBuf::from);
    if let (Some(preload), Some(probe)) = (named("FARMEM_TEST_PRELOAD"), named("FARMEM_TEST_PAGER"))
    {
        return Some(Artefacts { preload, probe });
    }
    let target = target_directory();
    let preload = target.join("release/libfarmem_preload.so");
    let probe = target.join("release/examples/runtime_probe");
    let library: &[&str] = &["build", "--release", "-p", "farmem-preload"];
    let pager = ["rustc", "--release", "-p", "farmem-pagerd", "--example", "runtime_probe"];
    let pager = [&pager[..], &["--", "-Ctarget-feature=+crt-static"]].concat();
    for arguments in [library, &pager] {
        let built = Command::new(env!("CARGO"))
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("CARGO_TARGET_DIR", &target)
            .output()
            .ok()
            .filter(|output| output.status.success());
        if built.is_none() {
            eprintln!("skipped: `cargo {}` does not succeed here", arguments.join(" "));
            return None;
        }
    }
    Some(Artefacts { preload, probe })
}

/// This test is `target/PROFILE/deps/NAME`.
fn target_directory() -> PathBuf {
    let test = env::current_exe().expect("a running test has a path");
    test.ancestors().nth(3).expect("cargo puts tests three levels down").to_owned()
}

/// The example that holds the programs; cargo builds it with this test.
pub(crate) fn specimen() -> PathBuf {
    let test = env::current_exe().expect("a running test has a path");
    test.ancestors().nth(2).expect("target/PROFILE").join("examples/specimen")
}

/// One run: a control socket, a limit, and the programs started with them.
pub(crate) struct Run {
    name: String,
    listener: OwnedFd,
    variable: String,
    preload: &'static Path,
}

impl Run {
    /// `None` where the artefacts are missing: the test is skipped.
    pub(crate) fn new(limit_mib: u64) -> Option<Self> {
        let artefacts = artefacts()?;
        Some(Self::with_pager(limit_mib, &artefacts.probe.display().to_string(), artefacts))
    }

    pub(crate) fn with_pager(limit_mib: u64, pager: &str, artefacts: &'static Artefacts) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("farmem-test-{}-{count}-", std::process::id());
        let flags = SocketFlags::CLOEXEC;
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap()).unwrap();
        listen(&listener, 1024).unwrap();
        set_socket_timeout(&listener, Timeout::Recv, Some(PATIENCE)).unwrap();
        let variable = format!("v1:{name}:{}:{pager}", limit_mib * MIB);
        Self { name, listener, variable, preload: &artefacts.preload }
    }

    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("FARMEM_RUN", &self.variable).env("LD_PRELOAD", self.preload);
        command
    }

    pub(crate) fn specimen(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(specimen());
        command.args(arguments);
        command
    }

    /// The program's output; that it succeeded and said nothing on standard error is checked.
    pub(crate) fn output(&self, command: &mut Command) -> String {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let (stdout, stderr) =
            (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert!(status.success() && stderr.is_empty(), "{command:?}: {status} {stdout} {stderr}");
        stdout
    }

    /// The next caller at the control socket.
    pub(crate) fn accept(&self) -> Caller {
        let socket = retry_on_intr(|| accept(&self.listener)).expect("somebody calls");
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).unwrap();
        Caller(socket)
    }

    /// Watchers and pagers of this run's programs that are alive. They share the programs' memory,
    /// and so the environment in it.
    pub(crate) fn companions(&self) -> Vec<i32> {
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter(|&process| self.is_companion(process)).collect()
    }

    fn is_companion(&self, process: i32) -> bool {
        let has = |file: &str, part: &str| {
            fs::read(format!("/proc/{process}/{file}"))
                .is_ok_and(|content| String::from_utf8_lossy(&content).contains(part))
        };
        has("comm", "farmem-") && has("environ", &self.name)
    }

    /// Waits until the run has exactly `count` companions.
    pub(crate) fn await_companions(&self, count: usize) {
        await_that(&format!("{count} companions"), || {
            reap_companions();
            self.companions().len() == count
        });
    }
}

/// A connection to the control socket.
pub(crate) struct Caller(OwnedFd);

impl Caller {
    /// The next packet; `None` when the caller has closed.
    pub(crate) fn receive(&self) -> Option<String> {
        let mut buffer = [0; 65536];
        let mut receive = || recv(&self.0, &mut buffer[..], RecvFlags::empty());
        // A caller that dies with packets unread resets the connection, and the kernel says so
        // before it hands out what the caller had sent.
        let received = match retry_on_intr(&mut receive) {
            Err(Errno::CONNRESET) => retry_on_intr(receive),
            received => received,
        };
        let (length, _) = received.expect("in time");
        (length > 0).then(|| String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    pub(crate) fn send(&self, packet: &str) {
        send(&self.0, packet.as_bytes(), SendFlags::NOSIGNAL).expect("the caller listens");
    }

    /// Receives until a packet contains `text`.
    pub(crate) fn await_text(&self, text: &str) -> String {
        loop {
            let packet = self.receive().unwrap_or_else(|| panic!("closed before {text:?}"));
            if packet.contains(text) {
                return packet;
            }
        }
    }
}

pub(crate) fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for watchers and pagers that have ended and are this process's children now, and for no
/// other child: those belong to the tests that started them.
pub(crate) fn reap_companions() {
    let children = fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    for child in children.flat_map(|list| {
        list.split_whitespace().filter_map(|child| child.parse::<i32>().ok()).collect::<Vec<_>>()
    }) {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        if stat.contains("(farmem-") && stat.contains(") Z ") {
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) };
        }
    }
}

/// Whether the process exists and is no zombie.
pub(crate) fn is_alive(process: i32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

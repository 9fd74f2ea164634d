//! Roles of this test binary: a program, and a pager that speaks the control protocol and pages
//! nothing.
//!
//! The program starts the pager twice removed, so that it becomes a child of the supervisor as a
//! real one does, and waits for its word before it goes on.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::time::Duration;

use farmem_supervise::{
    Counter, Hello, LinkError, PROTOCOL_VERSION, PagerLink, PagerMessage, RUN_VARIABLE,
    RunVariable, SessionReport, StatsLayout, StatsWriter, SupervisorMessage,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::installation::Installation;

const ROLE: &str = "TEST_ROLE";
const SCRIPT: &str = "TEST_SCRIPT";
const PROGRAM_PID: &str = "TEST_PROGRAM_PID";
const THEN: &str = "TEST_THEN";
const FIFO: &str = "TEST_FIFO";
const PATIENCE: Duration = Duration::from_secs(10);

/// What the pager does once it is armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    /// Dies without a word.
    Die,
    /// Dies before it is armed.
    DieUnarmed,
    /// Says that memory is lost.
    Fatal,
    /// Leaves in order.
    Bye,
    /// Speaks another version.
    Foreign,
    /// Stays until the supervisor has died, then kills the program as a real one does.
    Stay,
    /// Stays whatever happens.
    Stuck,
}

const SCRIPTS: [Script; 7] = [
    Script::Die,
    Script::DieUnarmed,
    Script::Fatal,
    Script::Bye,
    Script::Foreign,
    Script::Stay,
    Script::Stuck,
];

/// `farmem run FLAGS -- a program with such a pager`, which goes on with the shell command `then`.
pub(crate) fn run_with_pager(
    installation: &Installation,
    flags: &[&str],
    script: Script,
    then: &str,
) -> Command {
    let mut command = installation.farmem(["run"].iter().chain(flags));
    command.arg("--").arg(std::env::current_exe().unwrap()).args(ROLE_ARGUMENTS);
    command.env(ROLE, "program").env(SCRIPT, format!("{script:?}")).env(THEN, then);
    command.env(FIFO, installation.folder().join("fifo"));
    command
}

/// Selects the one test below that is no test.
const ROLE_ARGUMENTS: [&str; 4] =
    ["--exact", "fake_pager::play_the_role", "--ignored", "--nocapture"];

#[test]
#[ignore = "not a test: what the other tests run under farmem"]
fn play_the_role() {
    match std::env::var(ROLE).as_deref() {
        Ok("program") => program(),
        Ok("between") => {
            become_role("pager").spawn().unwrap();
            exit(0)
        }
        Ok("pager") => pager(),
        _ => panic!("only farmem run starts this"),
    }
}

fn become_role(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(ROLE_ARGUMENTS).env(ROLE, role);
    command
}

fn fifo() -> PathBuf {
    PathBuf::from(std::env::var_os(FIFO).unwrap())
}

fn program() -> ! {
    let fifo = fifo();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let _ = fs::remove_file(&fifo);
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
    let mut between = become_role("between");
    between.env(PROGRAM_PID, std::process::id().to_string());
    assert!(between.status().unwrap().success());
    // Until the pager has closed its end: it has done all that its script says.
    let mut word = String::new();
    fs::File::open(&fifo).unwrap().read_to_string(&mut word).unwrap();
    assert_eq!(word, "done");
    let then = std::env::var(THEN).unwrap();
    panic!("{}", Command::new("sh").arg("-c").arg(then).exec());
}

fn pager() -> ! {
    let variable = RunVariable::decode(&std::env::var_os(RUN_VARIABLE).unwrap()).unwrap();
    let script = std::env::var(SCRIPT).unwrap();
    let script = *SCRIPTS.iter().find(|known| format!("{known:?}") == script).unwrap();
    let program: u32 = std::env::var(PROGRAM_PID).unwrap().parse().unwrap();
    let stats = stats_page();
    let version = PROTOCOL_VERSION + u32::from(script == Script::Foreign);
    let pager_pid = std::process::id();
    let hello = Hello { version, program_pid: program, pager_pid, name: "tested".to_owned() };
    let fifo = fifo();
    let connected =
        PagerLink::connect(&variable.socket, &hello, stats.as_fd(), PATIENCE, &|_| false);
    let (link, welcome) = match connected {
        Ok((link, met)) => (link, met.welcome),
        Err(LinkError::Refused(reason)) => {
            println!("refused: {reason}");
            done(&fifo);
        }
        Err(error) => panic!("{error}"),
    };
    println!(
        "welcome limit={} server={} spill={:?}",
        welcome.limit_bytes, welcome.server, welcome.spill
    );
    if script != Script::DieUnarmed {
        link.send_armed(stats.as_fd()).unwrap();
        link.send(&PagerMessage::Session(session(&welcome.server)), &[]).unwrap();
    }
    play(script, link, program, &fifo)
}

fn play(script: Script, mut link: PagerLink, program: u32, fifo: &Path) -> ! {
    match script {
        Script::Die | Script::DieUnarmed | Script::Foreign => done(fifo),
        Script::Fatal => {
            let message = "lost memory server 192.0.2.1:7070 and with it region 7".to_owned();
            link.send(&PagerMessage::Fatal { message, exit_code: 125 }, &[]).unwrap();
            done(fifo)
        }
        Script::Bye => {
            link.send(&PagerMessage::Bye, &[]).unwrap();
            done(fifo)
        }
        Script::Stay | Script::Stuck => {
            fs::write(fifo, "done").unwrap();
            loop {
                poll(&mut [PollFd::from_borrowed_fd(link.fd(), PollFlags::IN)], None).unwrap();
                match link.try_receive() {
                    Ok(Some(SupervisorMessage::Limit { bytes })) => println!("limit {bytes}"),
                    Ok(_) => {}
                    Err(_) => {
                        let program = Pid::from_raw(i32::try_from(program).unwrap()).unwrap();
                        let _ = kill_process(program, Signal::KILL);
                        exit(0)
                    }
                }
            }
        }
    }
}

fn done(fifo: &Path) -> ! {
    fs::write(fifo, "done").unwrap();
    exit(0)
}

/// What a real pager shares through a mapping, written once.
fn stats_page() -> fs::File {
    let words: Vec<std::sync::atomic::AtomicU64> =
        (0..StatsLayout::WORDS).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
    let writer = StatsWriter::new(&words);
    writer.set(Counter::Faults, 11);
    writer.set(Counter::ResidentBytes, 12 << 20);
    writer.set(Counter::LocalPeakBytes, 13 << 20);
    writer.set(Counter::ExternalBytes, 3 << 20);
    writer.set(Counter::ExternalPeakBytes, 5 << 20);
    let bytes: Vec<u8> =
        words.into_iter().flat_map(|word| word.into_inner().to_le_bytes()).collect();
    let memfd = rustix::fs::memfd_create("stats", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = fs::File::from(memfd);
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    file
}

fn session(server: &str) -> SessionReport {
    SessionReport {
        server: server.to_owned(),
        session: 1,
        token: 2,
        epoch: 3,
        incarnation: 4,
        region: 7,
        granted: 64 << 20,
    }
}

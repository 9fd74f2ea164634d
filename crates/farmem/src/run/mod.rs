//! `farmem run`: the supervisor of one program and all that it starts.
//!
//! * [`program`]: whether the program can be paged.
//! * [`private_server`]: the memory server of this run, where none was named.
//! * [`supervisor`]: the loop that waits for signals, pagers and their programs.
//! * [`pagers`]: what the supervisor knows of each pager, and when a program must be stopped.
//! * [`descriptors`]: how many pagers the supervisor can take in.
//! * [`family`]: which processes belong to the run.
//! * [`farewell`]: ends the sessions that pagers leave behind.
//! * [`tally`], [`progress`] and [`report`]: what was counted, and how it is told.

mod descriptors;
mod family;
mod farewell;
mod inheritance;
mod pagers;
mod private_server;
mod program;
mod progress;
mod report;
mod supervisor;
mod tally;
mod tree;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use farmem_supervise::{
    Listener, RUN_VARIABLE, RunVariable, SignalQueue, children_usage, start_program,
};
use farmem_transport::ServerAddress;
use rustix::process::{Pid, Signal};

pub(crate) use crate::run::private_server::READY;

use crate::artefacts::Artefacts;
use crate::cli::RunOptions;
use crate::run::private_server::PrivateServer;
use crate::run::report::Report;
use crate::run::supervisor::{Supervisor, SupervisorParts};
use crate::size::Size;
use crate::{doctor, machine, say, standard_error};

/// farmem itself failed, or stopped the program because memory was lost.
pub(crate) const OWN_FAILURE: u8 = 125;
/// The program cannot be executed, as shells say it.
const NOT_EXECUTABLE: u8 = 126;
/// There is no such program, as shells say it.
const NOT_FOUND: u8 = 127;
/// Shells add it to the number of the signal that ended a program.
const SIGNAL_BASE: i32 = 128;

/// Less would hold little more than the pager itself, the victim buffer and a program's stacks.
const LOCAL_MIN: u64 = 16 << 20;

/// How long a server that was named may take to answer.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By itself, with this status.
    Exited(u8),
    /// By this signal.
    Signalled(i32),
}

impl Ending {
    /// The status as a shell shows it.
    pub(crate) const fn status(self) -> i32 {
        match self {
            Self::Exited(status) => status as i32,
            Self::Signalled(signal) => SIGNAL_BASE + signal,
        }
    }
}

/// Runs the program. Returns its exit status, or dies of the signal that it died of.
pub(crate) fn run(options: &RunOptions) -> ExitCode {
    match supervise(options) {
        Ok(Ending::Exited(status)) => ExitCode::from(status),
        Ok(Ending::Signalled(signal)) => die_of(signal),
        Err(error) => {
            say(&error);
            ExitCode::from(OWN_FAILURE)
        }
    }
}

fn supervise(options: &RunOptions) -> anyhow::Result<Ending> {
    let artefacts = Artefacts::find()?;
    doctor::require_for_run()?;
    let limit_bytes = local_limit(options.local)?;
    let spill = options.spill.as_deref().map(spill_directory).transpose()?;
    let stats_file = options.stats.as_deref().map(create).transpose()?;
    let named = options.server.as_deref().map(named_server).transpose()?;
    // From here on no other thread may exist, and every process that loses its parent is ours.
    let signals =
        SignalQueue::block_all_but(&supervisor::NOT_READ).context("cannot queue signals")?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("cannot become the parent of orphans (PR_SET_CHILD_SUBREAPER)")?;
    let socket = format!("farmem-{:032x}", random()?);
    let listener = Listener::bind(&socket)?;
    let (server, private_server) = match named {
        Some(address) => (address, None),
        None => start_private_server(limit_bytes)?,
    };

    let variable = RunVariable { socket, limit_bytes, pagerd: artefacts.pagerd };
    let mut command = command(options, &variable, &artefacts.preload);
    if let Some(reason) = program::unpaged(&options.program[0])
        && !options.quiet
    {
        let name = options.program[0].display();
        standard_error::tell(format_args!("{name} runs without paging: {reason}"));
    }
    let started = Instant::now();
    let program = match start_program(&mut command, &signals) {
        Ok(child) => Pid::from_child(&child),
        Err(error) => return Ok(not_started(&options.program[0], &error)),
    };
    let supervisor = Supervisor::new(SupervisorParts {
        program,
        limit_bytes,
        server,
        private_server,
        spill,
        listener,
        progress: options.progress,
        quiet: options.quiet,
    });
    let outcome = supervisor.run(&signals)?;
    let wall = started.elapsed();
    // Its server would count as a child of the run once it has ended.
    let usage = children_usage();
    // Before signals can end this process, which would leave the server's folder behind. Whoever has sent
    // one meanwhile wants the run to end, which it has.
    drop(outcome.private_server);
    while let Ok(Some(_)) = signals.next() {}
    signals.restore();
    let ending = outcome.ending;
    let report = Report { limit_bytes, wall, ending, tally: outcome.tally, usage };
    let written = stats_file.map_or(Ok(()), |file| {
        let path = options.stats.as_deref().unwrap_or(Path::new("")).display();
        report.write_json(file).with_context(|| format!("cannot write {path}"))
    });
    if !options.quiet {
        standard_error::tell(report.summary());
    }
    written.map(|()| ending)
}

/// The limit that was asked for, or four fifths of what is available.
fn local_limit(asked: Option<Size>) -> anyhow::Result<u64> {
    let bytes = match asked {
        Some(Size(bytes)) => bytes,
        None => {
            let available = machine::available()
                .context("cannot read how much memory is available; name a limit by --local")?;
            available.bytes / 5 * 4
        }
    };
    if bytes < LOCAL_MIN {
        bail!("a local limit of {} is too small: the least is {}", Size(bytes), Size(LOCAL_MIN));
    }
    Ok(bytes)
}

/// The directory for what the memory server has no room for, by a name that does not depend on
/// where the program goes.
fn spill_directory(asked: &Path) -> anyhow::Result<String> {
    let directory = asked.canonicalize().ok().filter(|directory| directory.is_dir());
    let Some(directory) = directory else {
        bail!("--spill {}: there is no such directory", asked.display());
    };
    match directory.into_os_string().into_string() {
        Ok(text) => Ok(text),
        Err(text) => bail!("--spill {}: the name is not UTF-8", text.display()),
    }
}

/// The address that pagers connect to, of a server that answers: a program that comes to need it only after an
/// hour would be stopped then for a name that was mistyped.
fn named_server(name: &str) -> anyhow::Result<String> {
    let address: ServerAddress = name.parse()?;
    // Pagers cannot resolve names: a resolver allocates, reads files and takes seconds.
    let endpoint = address.resolve().with_context(|| format!("cannot resolve {name}"))?;
    farmem_remote::admin::ping(&endpoint, SERVER_TIMEOUT).with_context(|| {
        format!(
            "{name} does not serve; start one there by farmem serve, or name another by --server"
        )
    })?;
    Ok(endpoint.to_string())
}

/// A memory server for this run alone, and its address.
fn start_private_server(limit_bytes: u64) -> anyhow::Result<(String, Option<PrivateServer>)> {
    let server = PrivateServer::start(private_memory(limit_bytes))
        .context("cannot start a private memory server; name one by --server")?;
    Ok((server.address(), Some(server)))
}

/// What the private server may lend: half of what the local limit leaves of the available memory.
fn private_memory(limit_bytes: u64) -> u64 {
    let available = machine::available().map_or(0, |available| available.bytes);
    available.saturating_sub(limit_bytes) / 2
}

fn command(options: &RunOptions, variable: &RunVariable, preload: &Path) -> Command {
    let mut command = Command::new(&options.program[0]);
    command.args(&options.program[1..]);
    // As execvp would: the program sees the name that it was called by.
    command.arg0(&options.program[0]);
    command.env(RUN_VARIABLE, variable.encode());
    command.env("LD_PRELOAD", preload_list(preload, std::env::var_os("LD_PRELOAD")));
    command
}

/// Ours comes first, and only once even where one run starts another.
fn preload_list(preload: &Path, before: Option<OsString>) -> OsString {
    let mut list = preload.as_os_str().to_owned();
    if let Some(before) = before.filter(|before| !before.is_empty() && *before != list) {
        list.push(":");
        list.push(before);
    }
    list
}

fn not_started(name: &std::ffi::OsStr, error: &io::Error) -> Ending {
    let status = match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    standard_error::tell(format_args!("cannot run {}: {error}", name.display()));
    Ending::Exited(status)
}

/// Ends this process as its program ended, so that whoever waits for it sees the same.
fn die_of(signal: i32) -> ExitCode {
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    // The program has dumped its core, if it was to; another one of the supervisor tells nothing.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    if let Some(signal) = Signal::from_named_raw(signal) {
        // Twice: the standard library catches the first SIGSEGV or SIGBUS, looks whether a stack
        // has overflowed, and goes back to the default.
        for _ in 0..2 {
            let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        }
    }
    // The signal is one that this process ignores (SIGPIPE) or has no name for.
    ExitCode::from(u8::try_from(SIGNAL_BASE + signal).unwrap_or(OWN_FAILURE))
}

fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("cannot create {}", path.display()))
}

/// 128 bits that nobody can guess.
fn random() -> io::Result<u128> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_limit_has_a_least_value_and_a_default() {
        assert_eq!(local_limit(Some(Size(LOCAL_MIN))).unwrap(), LOCAL_MIN);
        let error = local_limit(Some(Size(LOCAL_MIN - 1))).unwrap_err().to_string();
        assert_eq!(error, "a local limit of 15 MiB is too small: the least is 16 MiB");
        let available = machine::available().unwrap().bytes;
        assert!(local_limit(None).unwrap() < available);
    }

    #[test]
    fn the_preload_library_comes_first_and_once() {
        let ours = Path::new("/lib/ours.so");
        let list = |before: Option<&str>| preload_list(ours, before.map(OsString::from));
        assert_eq!(list(None), "/lib/ours.so");
        assert_eq!(list(Some("")), "/lib/ours.so");
        assert_eq!(list(Some("/lib/theirs.so")), "/lib/ours.so:/lib/theirs.so");
        assert_eq!(list(Some("/lib/ours.so")), "/lib/ours.so");
    }
}

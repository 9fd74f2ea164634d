//! Another process goes on where a server stops: SIGUSR2 starts the program anew, by the name that
//! it was started by, so that a new build in its place is what goes on.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use farmem_memserver::{Handed, LogLevel, LogLine, LogSink, StopHandle};
use farmem_transport::Passage;

/// What tells the program that it is a successor.
const TAKE_OVER: &str = "--take-over";

/// How often it is looked whether a successor has ended, or was given up.
const LOOK: Duration = Duration::from_millis(20);

static TURN: Mutex<()> = Mutex::new(());

/// Starts a successor, on a thread of its own, and hands over to it. If nothing comes of it the
/// server goes on, and the log says why.
pub(crate) fn start(server: StopHandle, log: LogSink) {
    thread::spawn(move || {
        // A successor that has failed has ended before there is another one.
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = succeed(&server) {
            let message = format_args!("no successor: {error:#}");
            let line = LogLine::new(LogLevel::Error, "successor_failed", message);
            log.line(&line.with("error", format!("{error:#}")));
        }
    });
}

/// Returns only if nothing comes of it: once the successor serves, this process ends.
fn succeed(server: &StopHandle) -> anyhow::Result<()> {
    let (mut child, passage) = spawn()?;
    let handed = server.hand_over(passage);
    let mut is_late = handed.is_err();
    let status = loop {
        if is_late {
            // It may have ended by itself.
            let _ = child.kill();
            break child.wait().context("cannot wait for it")?;
        }
        if let Some(status) = child.try_wait().context("cannot wait for it")? {
            break status;
        }
        thread::sleep(LOOK);
        // Then it was given up, and must not go on with what it was handed.
        is_late = server.serves();
    };
    server.clear_after(child.id());
    handed.context("it is not let in")?;
    anyhow::bail!("it has ended ({status})")
}

fn spawn() -> anyhow::Result<(Child, Passage)> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let program = (!arguments.is_empty()).then(|| arguments.remove(0));
    let program = program.context("this process was started without a name")?;
    if !arguments.iter().any(|argument| argument == TAKE_OVER) {
        arguments.push(TAKE_OVER.into());
    }
    let (ours, theirs) = Passage::pair().context("cannot make a passage")?;
    let mut command = Command::new(&program);
    command.args(arguments).stdin(Stdio::from(theirs.into_descriptor()));
    let child = command.spawn();
    let child = child.with_context(|| format!("cannot start {}", program.display()))?;
    Ok((child, ours))
}

/// Tells a service manager that this process serves. It may not be the one that it has started.
pub(crate) fn tell_service_manager() -> io::Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name)?,
        _ => SocketAddr::from_pathname(&name)?,
    };
    let text = format!("READY=1\nMAINPID={}", std::process::id());
    UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address)?;
    Ok(())
}

/// What the server that started this process has handed over.
pub(crate) fn receive() -> anyhow::Result<Handed> {
    let input = io::stdin();
    let passage = rustix::io::fcntl_dupfd_cloexec(&input, 3).map_err(io::Error::from);
    let passage = passage.and_then(Passage::adopt);
    let passage =
        passage.context("--take-over is for successors that a server starts (SIGUSR2)")?;
    let nothing: OwnedFd =
        std::fs::File::open("/dev/null").context("cannot open /dev/null")?.into();
    rustix::stdio::dup2_stdin(nothing).context("cannot leave standard input")?;
    Handed::receive(passage).context("cannot take over from the running server, which serves on")
}

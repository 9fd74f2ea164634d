//! `farmem serve`: lends this machine's memory until it is told to stop.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, bail};
use farmem_memserver::{
    Ended, FileTierConfig, LogLevel, LogLine, LogSink, MemServer, MemoryLeft, ServerConfig,
    StopHandle,
};
use farmem_region::ByteCount;
use farmem_supervise::SignalQueue;
use farmem_transport::{Endpoint, ServerAddress};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;

use crate::cli::ServeOptions;
use crate::log;
use crate::machine;
use crate::run::READY;
use crate::size::{Size, Tier};
use crate::standard_error;
use crate::successor;

/// What a server does something at: the last one has another process go on, the others stop it in
/// order.
const SIGNALS: [Signal; 3] = [Signal::TERM, Signal::INT, Signal::USR2];

/// What a private server must not end by: whoever stops a whole session or control group sends it to every
/// process, and the program needs its memory until it has ended in its own way.
const PRIVATE_SIGNALS: [Signal; 6] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// Where a private server has its file tier: what is on a disk there may be large.
const PRIVATE_DIRECTORY: &str = "/var/tmp";
/// A private server keeps pages of so many times its memory compressed: more hardly ever fit.
const PRIVATE_COMPRESSED: u64 = 8;
/// What statfs calls a file system in memory (linux/magic.h).
const TMPFS: i32 = 0x0102_1994;

/// What a server needs beside the memory that it lends: for itself, and of that memory for its tables.
const OWN_BYTES: u64 = 16 << 20;
const OWN_PART: u64 = 64;

/// Beyond this many workers one more gains nothing: a worker carries several GB/s.
const WORKERS_MAX: usize = 4;

/// Serves until SIGTERM or SIGINT, or until another process does after SIGUSR2.
pub(crate) fn serve(options: &ServeOptions) -> anyhow::Result<ExitCode> {
    if let Some(supervisor) = options.private {
        die_with(supervisor)?;
    }
    machine::raise_descriptor_limit();
    // Before any thread starts, so that all of them leave these signals to the queue.
    let heeded = if options.private.is_some() { &PRIVATE_SIGNALS[..] } else { &SIGNALS };
    let signals = SignalQueue::block(heeded).context("cannot queue signals")?;
    let mut config = config(options)?;
    let handed = options.take_over.then(successor::receive).transpose()?;
    if let Some(handed) = handed.as_ref().filter(|_| options.memory.is_none()) {
        config.memory = handed.memory();
    }
    let (memory, log) = (config.memory.get(), config.log.clone());
    let lent = Size(config.promise().get());
    let server = match handed {
        Some(handed) => MemServer::take_over(config, handed),
        None => MemServer::bind(config),
    };
    let server = server.context("cannot serve")?;
    if options.private.is_some() {
        std::io::stdout().write_all(READY.as_bytes()).context("farmem run has gone")?;
    } else {
        log.line(&announcement(&server, memory, lent));
        // One that is gone does not need to know.
        let _ = successor::tell_service_manager();
    }
    heed_signals(signals, server.stop_handle(), log.clone(), options.private);
    let ended = server.run().context("the memory server failed")?;
    if options.private.is_none() {
        log.line(&match ended {
            Ended::Stopped => LogLine::new(LogLevel::Info, "stopped", "stopped in order"),
            Ended::HandedOver => {
                let message = "another process serves from now on";
                LogLine::new(LogLevel::Info, "handed_over", message)
            }
        });
    }
    if options.private.is_some() {
        remove_folder(&options.listen);
    }
    Ok(ExitCode::SUCCESS)
}

fn config(options: &ServeOptions) -> anyhow::Result<ServerConfig> {
    let address: ServerAddress = options.listen.parse()?;
    let endpoint = address.resolve().with_context(|| format!("cannot resolve {address}"))?;
    refuse_public(&endpoint, options.insecure)?;
    let private = options.private.is_some();
    // Nobody asks a private server, and several would want the same port.
    let metrics = options.metrics.filter(|_| !private);
    if let Some(metrics) = metrics {
        refuse_public(&Endpoint::Tcp(metrics), options.insecure)?;
    }
    let memory = memory(options.memory)?;
    if !private && !options.take_over {
        // What a private server lends was chosen to fit, what is handed over is there.
        refuse_beyond_group(memory, machine::control_group_available())?;
    }
    let mut config = ServerConfig::new(vec![endpoint], ByteCount::new(memory));
    config.memory_left = machine::control_group_watch()
        .map(|look| MemoryLeft::new(move || look().map(ByteCount::new)));
    config.share_arena = private;
    if private {
        // Its client reads the arena by itself; what is left to serve can wait for a wake-up, and
        // a server that polls takes the processor from the program it serves.
        config.spin = std::time::Duration::ZERO;
        // The program may be one of many that want the processors.
        config.urgent = true;
    }
    // A private server ends with the only one who uses it.
    config.data = options.data.clone().filter(|_| !private);
    config.promise_percent = options.promise_ratio.0;
    config.directories =
        options.allow_dir.iter().map(|directory| allowed(directory)).collect::<Result<_, _>>()?;
    config.neighbours = Some(crate::neighbours::neighbours());
    tiers(&mut config, &options.tier)?;
    if private {
        private_tiers(&mut config);
    }
    config.workers = if private { 1 } else { workers() };
    config.metrics = metrics;
    let form = options.log_form;
    config.log = LogSink::new(move |line| {
        // In one call: a successor may write to the same place. A log that nobody reads any more does
        // not end the server.
        let text = format!("{}\n", log::written(line, form));
        if private {
            // Its program waits for it, and has nothing to do with who reads this.
            standard_error::write(&text);
        } else {
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    });
    Ok(config)
}

/// The tiers below memory, of each kind one.
fn tiers(config: &mut ServerConfig, given: &[Tier]) -> anyhow::Result<()> {
    let is_file = |tier: &&Tier| matches!(tier, Tier::File(..));
    let files = given.iter().filter(is_file).count();
    for (kind, count) in [("compressed", given.len() - files), ("file", files)] {
        if count > 1 {
            bail!("--tier {kind}=... is given {count} times: a server has one tier of each kind");
        }
    }
    for tier in given {
        match tier {
            Tier::Compressed(Size(bytes)) => config.tiers.compressed = ByteCount::new(*bytes),
            Tier::File(directory, Size(bytes)) => {
                let (directory, size) = (directory.clone(), ByteCount::new(*bytes));
                config.tiers.file = Some(FileTierConfig { directory, size });
            }
        }
    }
    Ok(())
}

/// A directory by its one absolute name: what a client asks for is compared with that.
fn allowed(directory: &Path) -> anyhow::Result<PathBuf> {
    let real = directory.canonicalize();
    real.with_context(|| format!("--allow-dir {}: it cannot be used", directory.display()))
}

/// The tiers of a private server: what gets cold is compressed, and what memory has no room for
/// goes to a file. No more is promised than memory and file hold, however well pages compress.
fn private_tiers(config: &mut ServerConfig) {
    let memory = config.memory.get();
    config.tiers.compressed = ByteCount::new(memory.saturating_mul(PRIVATE_COMPRESSED));
    let file = Path::new(PRIVATE_DIRECTORY);
    config.tiers.file = file_tier(file).filter(|tier| tier.size.get() > 0);
    let file = config.tiers.file.as_ref().map_or(0, |tier| tier.size.get());
    config.promise_max = Some(ByteCount::new(memory.saturating_add(file)));
}

/// Half of what is free in a directory on a disk, if a file without a name can be made there.
fn file_tier(directory: &Path) -> Option<FileTierConfig> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR).ok()?;
    let kind = rustix::fs::fstatfs(&file).ok()?.f_type;
    if kind == rustix::fs::FsWord::from(TMPFS) {
        return None;
    }
    let space = rustix::fs::fstatvfs(&file).ok()?;
    let size = ByteCount::new(space.f_bavail.saturating_mul(space.f_frsize) / 2);
    Some(FileTierConfig { directory: directory.to_owned(), size })
}

/// What is sent is not encrypted and whoever connects is served, so only this machine may.
fn refuse_public(endpoint: &Endpoint, insecure: bool) -> anyhow::Result<()> {
    match endpoint {
        Endpoint::Tcp(address) if !address.ip().is_loopback() && !insecure => bail!(
            "refusing to listen at {address}: other machines reach it, there is no TLS yet, and \
             everybody who connects can borrow memory; listen at 127.0.0.1, or give --insecure on a \
             network that you trust"
        ),
        Endpoint::Tcp(_) | Endpoint::Unix(_) => Ok(()),
    }
}

fn memory(asked: Option<Size>) -> anyhow::Result<u64> {
    let half = || machine::available().map(|available| Size(available.bytes / 2));
    let Size(bytes) = asked
        .or_else(half)
        .context("cannot read how much memory is available; name an amount by --memory")?;
    Ok(bytes)
}

/// Beyond what its control group leaves, the kernel would end the server in the middle of its work.
fn refuse_beyond_group(memory: u64, left: Option<u64>) -> anyhow::Result<()> {
    let own = OWN_BYTES + memory / OWN_PART;
    match left {
        Some(left) if memory.saturating_add(own) > left => bail!(
            "refusing to lend {}: the control group that this process is in leaves {}, the server needs \
             {} for itself, and the kernel would kill it once the limit is reached; give a smaller \
             --memory, with --tier file=DIR:SIZE for the rest, or a larger limit",
            Size(memory),
            Size(left),
            Size(own)
        ),
        _ => Ok(()),
    }
}

fn workers() -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(WORKERS_MAX))
}

fn announcement(server: &MemServer, memory: u64, lent: Size) -> LogLine {
    let endpoints: Vec<String> = server.endpoints().map(Endpoint::to_string).collect();
    let (endpoints, incarnation) = (endpoints.join(", "), server.incarnation().get());
    let incarnation = format!("{incarnation:016x}");
    let metrics = server.metrics_address().map(|address| address.to_string());
    let also = metrics.as_ref().map_or_else(String::new, |at| format!(", metrics at http://{at}"));
    let message = format_args!("lending {lent} at {endpoints} (incarnation {incarnation}){also}");
    let line = LogLine::new(LogLevel::Info, "started", message)
        .with("memory_bytes", memory)
        .with("listen", endpoints)
        .with("incarnation", incarnation)
        .with("pid", u64::from(std::process::id()));
    metrics.into_iter().fold(line, |line, metrics| line.with("metrics", metrics))
}

fn heed_signals(signals: SignalQueue, server: StopHandle, log: LogSink, private: Option<i32>) {
    thread::spawn(move || {
        loop {
            match signals.next() {
                Ok(Some(_)) if private.is_some_and(is_child_of) => {}
                Ok(Some(signal)) if signal.number == Signal::USR2.as_raw() => {
                    successor::start(server.clone(), log.clone());
                }
                Ok(Some(_)) => return server.stop(),
                // Whatever poll says: as soon as a signal is there, it is heeded.
                _ => drop(poll(&mut [PollFd::new(&signals, PollFlags::IN)], None)),
            }
        }
    });
}

/// A private server must not outlive its `farmem run`, however that ends. The kernel's signal comes when it
/// has another parent already: [`is_child_of`] tells it from those that are not heeded.
fn die_with(supervisor: i32) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .context("cannot ask for a signal at the supervisor's death")?;
    if !is_child_of(supervisor) {
        bail!("the farmem run that this server is for has ended");
    }
    Ok(())
}

fn is_child_of(process: i32) -> bool {
    rustix::process::getppid().is_some_and(|parent| parent.as_raw_pid() == process)
}

/// The socket has gone with the listener; its folder is nobody's if `farmem run` was killed.
fn remove_folder(listen: &str) {
    let Ok(ServerAddress::Unix(path)) = listen.parse() else {
        return;
    };
    if let Some(folder) = path.parent() {
        // Fails where it is not empty, which would be somebody else's, or where it is gone already.
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_and_unix_sockets_are_served_without_saying_so() {
        let check = |text: &str, insecure| {
            let address: ServerAddress = text.parse().unwrap();
            refuse_public(&address.resolve().unwrap(), insecure)
        };
        for address in ["127.0.0.1:7070", "[::1]:7070", "127.1.2.3:1", "unix:/run/s"] {
            assert!(check(address, false).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:7070", "[::]:7070", "192.0.2.1:7070"] {
            let error = check(address, false).unwrap_err().to_string();
            assert!(error.contains("TLS"), "{error}");
            assert!(check(address, true).is_ok(), "{address}");
        }
    }

    #[test]
    fn more_than_the_control_group_leaves_is_not_lent() {
        assert!(refuse_beyond_group(1 << 30, None).is_ok());
        assert!(refuse_beyond_group(1 << 30, Some((1 << 30) + (32 << 20))).is_ok());
        let refused = refuse_beyond_group(1 << 30, Some(1 << 30)).unwrap_err().to_string();
        assert!(refused.contains("1 GiB") && refused.contains("32 MiB"), "{refused}");
        assert!(refuse_beyond_group(u64::MAX, Some(1 << 30)).is_err());
    }

    #[test]
    fn a_server_has_one_tier_of_each_kind() {
        let set = |given: &[&str]| {
            let given: Vec<Tier> = given.iter().map(|tier| tier.parse().unwrap()).collect();
            let mut config = ServerConfig::new(Vec::new(), ByteCount::new(1 << 20));
            tiers(&mut config, &given).map(|()| config.tiers)
        };
        let both = set(&["file=/a:2M", "compressed=1M"]).unwrap();
        assert_eq!(both.compressed, ByteCount::new(1 << 20));
        assert_eq!(both.file.unwrap().size, ByteCount::new(2 << 20));
        for (given, kind) in [
            (["compressed=1M", "compressed=2M"], "compressed"),
            (["file=/a:1M", "file=/b:1M"], "file"),
        ] {
            let refused = set(&given).unwrap_err().to_string();
            assert!(refused.contains(kind) && refused.contains("2 times"), "{refused}");
        }
    }
}

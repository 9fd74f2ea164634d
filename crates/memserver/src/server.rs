//! The server as its owner sees it: bind, run, stop.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use farmem_region::{ByteCount, Incarnation};
use farmem_transport::{Endpoint, Listener, Passage};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::setpriority_process;

use crate::config::ServerConfig;
use crate::engine::Engine;
use crate::handover::{self, HandOverError, Handed, Parts};
use crate::http::HttpPort;
use crate::journal::DataError;
use crate::log::{LogLevel, LogLine, LogSink, RateLimitedLog};
use crate::metrics::{self, Snapshot};
use crate::patience::{self, PATIENT_THREADS, Patience};
use crate::worker::{Mailbox, Purpose, Shared, Worker};

/// How often the journal is looked at: the disk must hold what is noted in between.
const JOURNAL_PAUSE_NANOS: i64 = 100_000_000;
/// How long after a try that failed it is written anew at the earliest: each try takes the disk's time, and all that
/// are connected wait for it.
const JOURNAL_RETRY: Duration = Duration::from_secs(1);
/// And at least so many times as long as the try took.
const JOURNAL_RETRY_TIMES: u32 = 20;

/// Priority of an urgent server among programs without real-time priority, from 19 (last) to -20: it
/// gets nine times the share of an ordinary one.
const URGENT_NICE: i32 = -10;

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Nothing was named to listen at.
    #[error("no address to listen at was given")]
    NoAddress,
    /// Less than a page.
    #[error("cannot lend {} bytes: the least is one page", .0.get())]
    TooSmall(ByteCount),
    /// The address cannot be had.
    #[error("cannot listen at {endpoint}")]
    Listen {
        /// The address.
        endpoint: Endpoint,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The address for metrics cannot be had.
    #[error("cannot listen for HTTP at {address}")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The memory cannot be had.
    #[error("cannot make an arena of {} bytes", memory.get())]
    Arena {
        /// Bytes asked for.
        memory: ByteCount,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is to outlive the process cannot be kept, or be gone on with.
    #[error("cannot use the directory for data")]
    Data(#[from] DataError),
    /// What is to outlive the process did not reach the disk.
    #[error("cannot leave the data in order: after the machine's end it would count as lost")]
    Settle(#[source] io::Error),
    /// What a running server holds cannot be gone on with.
    #[error("cannot take over from the running server, which serves on")]
    HandOver(#[from] HandOverError),
    /// The kernel's event interface failed.
    #[error("cannot wait for events")]
    Events(#[source] io::Error),
}

/// How a server's serving has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was stopped: all memory is free, or on the disk.
    Stopped,
    /// Another process serves in its place.
    HandedOver,
}

/// A memory server that listens and does not serve yet.
#[derive(Debug)]
pub struct MemServer {
    shared: Arc<Shared>,
    listeners: Arc<Vec<Listener>>,
    metrics: Option<HttpPort>,
    /// Whether what a former process was asked for is to be brought near.
    prefetches: AtomicBool,
}

/// Stops a server, or makes it hand over, from another thread.
#[derive(Debug, Clone)]
pub struct StopHandle {
    shared: Arc<Shared>,
}

impl StopHandle {
    /// Whether the server serves, and is not about to end or to hand over.
    #[must_use]
    pub fn serves(&self) -> bool {
        matches!(*self.shared.purpose(), Purpose::Serve)
    }

    /// Tells the server to stop: its `run` returns, all connections close, all memory is freed.
    pub fn stop(&self) {
        *self.shared.purpose() = Purpose::Stop;
        self.shared.end_threads();
    }

    /// Removes what a process has left in the directory for data that was to go on and is no more. Call it once
    /// that process has been waited for.
    pub fn clear_after(&self, process: u32) {
        self.shared.engine.clear_after(process);
    }

    /// Has another process go on with all that the server holds, in the same incarnation: the one at
    /// the other end of the passage, which is just being started and calls [`Handed::receive`].
    /// Returns once it has started, or does not; `run` returns once it serves.
    ///
    /// # Errors
    /// [`HandOverError`]: the server goes on, and nobody has noticed anything.
    pub fn hand_over(&self, passage: Passage) -> Result<(), HandOverError> {
        if self.shared.engine.config.share_arena {
            return Err(HandOverError::NotNow("a private server ends with its farmem run"));
        }
        match &mut *self.shared.purpose() {
            purpose @ Purpose::Serve => *purpose = Purpose::Prepare,
            Purpose::Prepare | Purpose::HandOver(_) => {
                return Err(HandOverError::NotNow("another hand-over is under way"));
            }
            Purpose::Stop => return Err(HandOverError::NotNow("the server is being stopped")),
        }
        let greeted = handover::greet(&passage).and_then(|()| {
            if self.shared.engine.close_jobs() {
                return Ok(());
            }
            let text = "a backup or a restore is under way: repeat it when that has ended";
            let error = HandOverError::NotNow(text);
            handover::refuse(&passage, &error);
            Err(error)
        });
        let mut purpose = self.shared.purpose();
        if matches!(*purpose, Purpose::Stop) {
            return Err(HandOverError::NotNow("the server is being stopped"));
        }
        match greeted {
            Ok(()) => {
                *purpose = Purpose::HandOver(passage);
                drop(purpose);
                self.shared.end_threads();
                Ok(())
            }
            Err(error) => {
                *purpose = Purpose::Serve;
                Err(error)
            }
        }
    }
}

impl MemServer {
    /// Takes the addresses and the memory.
    ///
    /// # Errors
    /// [`ServerError`], which says which of them cannot be had.
    pub fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        check(&config)?;
        let listeners = listen(&config.listen, &mut Vec::new())?;
        let metrics = listen_for_http(&config, None)?;
        let log = config.log.clone();
        let workers = config.workers.max(1);
        let server = Self::new(Engine::new(config)?, workers, log, listeners, metrics)?;
        server.prefetches.store(server.shared.engine.has_journal(), Ordering::Relaxed);
        Ok(server)
    }

    /// Goes on with what a running server has handed over, which ends.
    ///
    /// # Errors
    /// [`ServerError`]: the running server goes on as if nothing had been.
    pub fn take_over(config: ServerConfig, mut handed: Handed) -> Result<Self, ServerError> {
        let mut given = Vec::new();
        let taken = Self::prepare(config, &mut handed, &mut given).and_then(|server| {
            handed.ready()?;
            server.shared.engine.put_journal()?;
            Ok(server)
        });
        let mut server = match taken {
            Ok(server) => server,
            Err(error) => {
                handed.refuse(&error);
                return Err(error);
            }
        };
        handed.taken();
        let listeners = Arc::get_mut(&mut server.listeners).into_iter().flatten();
        // Those that are not in the configuration any more close.
        listeners.chain(&mut given).for_each(Listener::keep);
        Ok(server)
    }

    /// All that can be done while the running server may still go on. What is left in `given` is not
    /// listened at any more.
    fn prepare(
        config: ServerConfig,
        handed: &mut Handed,
        given: &mut Vec<Listener>,
    ) -> Result<Self, ServerError> {
        check(&config)?;
        for descriptor in std::mem::take(&mut handed.listeners) {
            given.push(Listener::adopt(descriptor).map_err(HandOverError::Io)?);
        }
        let listeners = listen(&config.listen, given)?;
        let metrics = listen_for_http(&config, handed.metrics.take())?;
        let log = config.log.clone();
        let workers = config.workers.max(1);
        Self::new(Engine::take_over(config, handed)?, workers, log, listeners, metrics)
    }

    fn new(
        engine: Engine,
        workers: usize,
        log: LogSink,
        listeners: Vec<Listener>,
        metrics: Option<HttpPort>,
    ) -> Result<Self, ServerError> {
        let mailboxes = (0..workers).map(|_| Mailbox::new()).collect::<io::Result<Vec<_>>>();
        let shared = Shared {
            engine,
            mailboxes: mailboxes.map_err(ServerError::Events)?,
            patience: Patience::default(),
            stop: event().map_err(ServerError::Events)?,
            purpose: Mutex::new(Purpose::Serve),
            log: RateLimitedLog::new(log),
            began: Instant::now(),
        };
        let (shared, listeners) = (Arc::new(shared), Arc::new(listeners));
        Ok(Self { shared, listeners, metrics, prefetches: AtomicBool::new(false) })
    }

    /// Where the server listens; a TCP port of 0 has become the real one.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.listeners.iter().map(Listener::endpoint)
    }

    /// Where metrics are asked for, if anywhere; a port of 0 has become the real one.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(HttpPort::address)
    }

    /// What tells this server from a former or later one at the same address.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.shared.engine.incarnation()
    }

    /// Stops the server later.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { shared: Arc::clone(&self.shared) }
    }

    /// Serves until stopped, or until another process does, on this thread and on one more for every
    /// worker beyond the first.
    ///
    /// # Errors
    /// [`ServerError::Events`] if the kernel's event interface fails.
    pub fn run(self) -> Result<Ended, ServerError> {
        loop {
            self.serve().map_err(ServerError::Events)?;
            let passage = match std::mem::replace(&mut *self.shared.purpose(), Purpose::Prepare) {
                Purpose::HandOver(passage) => passage,
                Purpose::Serve | Purpose::Prepare | Purpose::Stop => break,
            };
            match self.give(&passage) {
                Ok(()) => {
                    let Self { listeners, .. } = self;
                    Arc::into_inner(listeners).into_iter().flatten().for_each(Listener::leave);
                    return Ok(Ended::HandedOver);
                }
                Err(error) => self.shared.serve_again(&error),
            }
        }
        self.shared.engine.settle().map_err(ServerError::Settle)?;
        Ok(Ended::Stopped)
    }

    /// Serves until all threads are told to end; then nothing changes any more, and no connection is
    /// left.
    fn serve(&self) -> io::Result<()> {
        let shared = &self.shared;
        let result = thread::scope(|scope| {
            let metrics = self.metrics.as_ref().map(|port| {
                scope.spawn(move || port.serve(shared.stop.as_fd(), || shared.metrics()))
            });
            let keeper = scope.spawn(|| shared.engine.keep_room());
            let journal =
                shared.engine.has_journal().then(|| scope.spawn(|| shared.keep_journal()));
            if shared.engine.config.urgent {
                // What threads wait for; the threads above have time. Without the permission for it
                // the server takes its turn like any other program.
                let _ = setpriority_process(None, URGENT_NICE);
            }
            let others: Vec<_> = (1..shared.mailboxes.len())
                .map(|index| {
                    let worker = Worker::new(shared, index, Arc::default());
                    scope.spawn(move || worker.and_then(Worker::run))
                })
                .collect();
            for _ in 0..PATIENT_THREADS {
                scope.spawn(|| patience::serve(shared));
            }
            if self.prefetches.swap(false, Ordering::Relaxed) {
                scope.spawn(|| shared.engine.replay_working_sets());
            }
            let result = Worker::new(shared, 0, Arc::clone(&self.listeners)).and_then(Worker::run);
            shared.engine.stop_keeping();
            shared.end_threads();
            shared.patience.stop();
            let joined = |result: thread::Result<io::Result<()>>| {
                result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            joined(keeper.join().map(Ok))?;
            journal.map_or(Ok(()), |journal| joined(journal.join().map(Ok)))?;
            let results = others.into_iter().map(|worker| joined(worker.join()));
            let result = results.fold(result, io::Result::and);
            result.and(metrics.map_or(Ok(()), |metrics| joined(metrics.join())))
        });
        shared.close_left();
        result
    }

    /// Hands over what nobody changes any more.
    fn give(&self, passage: &Passage) -> Result<(), HandOverError> {
        let engine = &self.shared.engine;
        let (given, records) = engine.told(self.metrics.is_some());
        if !handover::fits(self.listeners.len()) {
            return Err(HandOverError::NotNow("it listens at more addresses than can be passed"));
        }
        let parts = Parts {
            arena: engine.arena.descriptor(),
            records,
            file: engine.file_descriptor(),
            lock: engine.lock_descriptor(),
            metrics: self.metrics.as_ref().map(HttpPort::descriptor),
            listeners: self.listeners.iter().map(Listener::descriptor).collect(),
        };
        handover::give(passage, &given, parts)
    }
}

fn check(config: &ServerConfig) -> Result<(), ServerError> {
    if config.listen.is_empty() {
        return Err(ServerError::NoAddress);
    }
    if config.memory.pages_rounded_up().get() == 0 {
        return Err(ServerError::TooSmall(config.memory));
    }
    Ok(())
}

/// Listens at all addresses, with the sockets of another process where there are such.
fn listen(endpoints: &[Endpoint], given: &mut Vec<Listener>) -> Result<Vec<Listener>, ServerError> {
    let is_meant = |endpoint: &Endpoint, given: &Endpoint| match (endpoint, given) {
        (Endpoint::Tcp(wanted), Endpoint::Tcp(given)) if wanted.port() == 0 => {
            wanted.ip() == given.ip()
        }
        (wanted, given) => wanted == given,
    };
    let mut listen = |endpoint: &Endpoint| {
        let there = given.iter().position(|given| is_meant(endpoint, given.endpoint()));
        if let Some(at) = there {
            return Ok(given.swap_remove(at));
        }
        let endpoint = endpoint.clone();
        Listener::bind(&endpoint).map_err(|source| ServerError::Listen { endpoint, source })
    };
    endpoints.iter().map(&mut listen).collect()
}

fn listen_for_http(
    config: &ServerConfig,
    given: Option<OwnedFd>,
) -> Result<Option<HttpPort>, ServerError> {
    let timeout = config.limits.metrics_timeout;
    let Some(address) = config.metrics else {
        return Ok(None);
    };
    if let Some(port) = given.and_then(|given| HttpPort::adopt(given, timeout).ok()) {
        let found = port.address();
        if found == address || (address.port() == 0 && found.ip() == address.ip()) {
            return Ok(Some(port));
        }
    }
    let bound = HttpPort::bind(address, timeout);
    bound.map(Some).map_err(|source| ServerError::Metrics { address, source })
}

impl Shared {
    /// What is to come of the server.
    fn purpose(&self) -> MutexGuard<'_, Purpose> {
        self.purpose.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all threads to end.
    fn end_threads(&self) {
        // An eventfd takes any number of ones; it is read only once all have ended.
        let _ = rustix::io::write(&self.stop, &1u64.to_le_bytes());
    }

    /// Lets the threads begin anew, as nobody else serves.
    fn serve_again(&self, error: &HandOverError) {
        let message = format_args!("cannot hand over, and serves on: {error}");
        let line = LogLine::new(LogLevel::Error, "hand_over_failed", message);
        self.log.line(&line.with("error", error.to_string()));
        if let Err(error) = self.engine.serve_again() {
            let message = format_args!("{error}");
            self.log.line(&LogLine::new(LogLevel::Error, "journal_failed", message));
        }
        let _ = rustix::io::read(&self.stop, &mut [0; 8]);
        let mut purpose = self.purpose();
        if matches!(*purpose, Purpose::Stop) {
            drop(purpose);
            self.end_threads();
        } else {
            *purpose = Purpose::Serve;
        }
    }

    /// Rewrites the journal whenever that is worth it, and where its disk was full and may have room, until the
    /// server is stopped.
    fn keep_journal(&self) {
        let pause = Timespec { tv_sec: 0, tv_nsec: JOURNAL_PAUSE_NANOS };
        let (mut next_try, mut was_broken) = (Instant::now(), false);
        // Whatever poll says: nobody waits for this thread but who stops the server.
        while !matches!(poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&pause)), Ok(1)) {
            let is_broken = self.engine.has_broken_journal();
            if is_broken != was_broken {
                self.tell_of_journal(is_broken);
                was_broken = is_broken;
            }
            self.engine.go_on_moving();
            let is_long = self.engine.has_long_journal();
            // Looked at however lately one was rewritten: room may have come by itself.
            let is_short = self.engine.lacks_journal_room();
            let lacks_room = (is_broken || is_short) && Instant::now() >= next_try;
            if !is_long && !lacks_room {
                continue;
            }
            let began = Instant::now();
            let renewed = self.engine.renew_journal();
            next_try = Instant::now() + JOURNAL_RETRY.max(began.elapsed() * JOURNAL_RETRY_TIMES);
            // Of one whose disk is full it was told.
            if let Err(error) = renewed
                && !lacks_room
            {
                let message = format_args!("cannot rewrite the journal: {error}");
                self.log.line(&LogLine::new(LogLevel::Error, "journal_failed", message));
            }
        }
    }

    fn tell_of_journal(&self, is_broken: bool) {
        let (level, event, message) = if is_broken {
            // After a hand-over that has failed they are taken.
            let text = if self.engine.check_journal().is_err() {
                "cannot note in the journal what happens, and have removed it: writes are refused as busy, and \
                 whoever serves after a kill begins with nothing, until the disk has room for a new one"
            } else {
                "there is no journal, and nothing is noted: whoever serves after a kill begins with nothing, until \
                 the disk has room for a new one"
            };
            (LogLevel::Error, "journal_failed", text)
        } else {
            (
                LogLevel::Info,
                "journal_mended",
                "the journal is written anew, and all is noted again",
            )
        };
        self.log.line(&LogLine::new(level, event, format_args!("{message}")));
    }

    /// What is asked for at the HTTP port.
    fn metrics(&self) -> String {
        let engine = &self.engine;
        metrics::render(&Snapshot {
            stat: engine.stat(),
            counters: &engine.counters,
            incarnation: engine.incarnation().get(),
            uptime: self.began.elapsed(),
        })
    }
}

pub(crate) fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use farmem_region::PageCount;

    use super::*;

    /// A journal that could not be written, and is removed, is written anew once it can be.
    #[test]
    fn cap_95_a_journal_that_is_given_up_is_written_anew() {
        let place = tempfile::tempdir().unwrap();
        let (sender, lines) = std::sync::mpsc::channel();
        let endpoint = Endpoint::Unix(place.path().join("socket"));
        let mut config = ServerConfig::new(vec![endpoint], PageCount::new(64).bytes());
        config.data = Some(place.path().join("data"));
        config.log = LogSink::new(move |line| sender.send(line.event).unwrap_or(()));
        let server = MemServer::bind(config.clone()).unwrap();
        let (stop, shared) = (server.stop_handle(), Arc::clone(&server.shared));
        let incarnation = server.incarnation();
        let served = thread::spawn(move || server.run().unwrap());
        shared.engine.give_journal_up();
        let patience = Duration::from_secs(10);
        assert_eq!(lines.recv_timeout(patience).unwrap(), "journal_failed");
        assert_eq!(lines.recv_timeout(patience).unwrap(), "journal_mended");
        let lacks = (shared.engine.has_broken_journal(), shared.engine.lacks_journal_room());
        assert_eq!(lacks, (false, false));
        stop.stop();
        assert_eq!(served.join().unwrap(), Ended::Stopped);
        drop((shared, stop));
        assert_eq!(MemServer::bind(config).unwrap().incarnation(), incarnation);
    }
}

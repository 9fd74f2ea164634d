//! The server as its owner sees it: bind, run, stop.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use farmem_region::{ByteCount, Incarnation};
use farmem_transport::{Endpoint, Listener};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::setpriority_process;

use crate::config::ServerConfig;
use crate::engine::Engine;
use crate::http::HttpPort;
use crate::journal::DataError;
use crate::log::{LogLevel, LogLine, RateLimitedLog};
use crate::metrics::{self, Snapshot};
use crate::patience::{self, PATIENT_THREADS, Patience};
use crate::worker::{Mailbox, Shared, Worker};

/// How often the journal is looked at: the disk must hold what is noted in between.
const JOURNAL_PAUSE_NANOS: i64 = 100_000_000;

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
    /// The kernel's event interface failed.
    #[error("cannot wait for events")]
    Events(#[source] io::Error),
}

/// A memory server that listens and does not serve yet.
#[derive(Debug)]
pub struct MemServer {
    shared: Arc<Shared>,
    listeners: Vec<Listener>,
    metrics: Option<HttpPort>,
}

/// Stops a server from another thread, or from a signal handler's thread.
#[derive(Debug, Clone)]
pub struct StopHandle {
    shared: Arc<Shared>,
}

impl StopHandle {
    /// Tells the server to stop: its `run` returns, all connections close, all memory is freed.
    pub fn stop(&self) {
        // An eventfd takes any number of ones; nobody ever reads this one.
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_le_bytes());
    }
}

impl MemServer {
    /// Takes the addresses and the memory.
    ///
    /// # Errors
    /// [`ServerError`], which says which of them cannot be had.
    pub fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        if config.listen.is_empty() {
            return Err(ServerError::NoAddress);
        }
        if config.memory.pages_rounded_up().get() == 0 {
            return Err(ServerError::TooSmall(config.memory));
        }
        let listen = |endpoint: &Endpoint| {
            let endpoint = endpoint.clone();
            Listener::bind(&endpoint).map_err(|source| ServerError::Listen { endpoint, source })
        };
        let listeners = config.listen.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
        let timeout = config.limits.metrics_timeout;
        let metrics = config.metrics.map(|address| {
            HttpPort::bind(address, timeout)
                .map_err(|source| ServerError::Metrics { address, source })
        });
        let metrics = metrics.transpose()?;
        let (log, workers) = (config.log.clone(), config.workers.max(1));
        let engine = Engine::new(config)?;
        let mailboxes = (0..workers).map(|_| Mailbox::new()).collect::<io::Result<Vec<_>>>();
        let shared = Shared {
            engine,
            mailboxes: mailboxes.map_err(ServerError::Events)?,
            patience: Patience::default(),
            stop: event().map_err(ServerError::Events)?,
            log: RateLimitedLog::new(log),
            began: std::time::Instant::now(),
        };
        Ok(Self { shared: Arc::new(shared), listeners, metrics })
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

    /// Serves until stopped, on this thread and on one more for every worker beyond the first.
    ///
    /// # Errors
    /// [`ServerError::Events`] if the kernel's event interface fails.
    pub fn run(self) -> Result<(), ServerError> {
        let Self { shared, listeners, metrics } = self;
        thread::scope(|scope| {
            let metrics = metrics.map(|port| {
                let shared = &shared;
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
                    let worker = Worker::new(&shared, index, Vec::new());
                    scope.spawn(move || worker.and_then(Worker::run))
                })
                .collect();
            for _ in 0..PATIENT_THREADS {
                scope.spawn(|| patience::serve(&shared));
            }
            let result = Worker::new(&shared, 0, listeners).and_then(Worker::run);
            shared.engine.stop_keeping();
            StopHandle { shared: Arc::clone(&shared) }.stop();
            shared.patience.stop();
            keeper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            if let Some(journal) = journal {
                journal.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
            let results = others.into_iter().map(|worker| {
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            let result = results.fold(result, io::Result::and);
            let served = metrics.map(|metrics| {
                metrics.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            result.and(served.unwrap_or(Ok(())))
        })
        .map_err(ServerError::Events)?;
        shared.engine.settle().map_err(ServerError::Settle)
    }
}

impl Shared {
    /// Rewrites the journal whenever that is worth it, until the server is stopped.
    fn keep_journal(&self) {
        let pause = Timespec { tv_sec: 0, tv_nsec: JOURNAL_PAUSE_NANOS };
        // Whatever poll says: nobody waits for this thread but who stops the server.
        while !matches!(poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&pause)), Ok(1)) {
            if self.engine.has_long_journal()
                && let Err(error) = self.engine.rewrite_journal()
            {
                let message = format_args!("cannot rewrite the journal: {error}");
                self.log.line(&LogLine::new(LogLevel::Error, "journal_failed", message));
            }
        }
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

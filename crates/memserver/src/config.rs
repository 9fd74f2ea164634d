//! What a memory server is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use farmem_region::{AddressWidths, ByteCount, ServerId};
use farmem_transport::Endpoint;
use farmem_wire::PAGES_PER_MESSAGE_MAX;

use crate::{LogSink, MemoryLeft, Neighbours};

/// How a memory server is to be.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: Vec<Endpoint>,
    /// Bytes of memory for pages.
    pub memory: ByteCount,
    /// How much of that the system would still give, where that may be less than is lent.
    pub memory_left: Option<MemoryLeft>,
    /// See [`TierConfig`].
    pub tiers: TierConfig,
    /// How much more than there is may be promised to clients, in percent of what there is. 100:
    /// nothing is promised twice.
    pub promise_percent: u64,
    /// Bytes to promise at most, if it is to be less than the tiers hold.
    pub promise_max: Option<ByteCount>,
    /// A directory for all that another process needs to go on where this one was killed: best one
    /// in memory (tmpfs). `None`: what a server holds ends with it.
    pub data: Option<PathBuf>,
    /// Directories whose files regions may be made from.
    pub directories: Vec<PathBuf>,
    /// How other memory servers are reached, of whose regions regions may be made.
    pub neighbours: Option<Neighbours>,
    /// The server's part in external addresses.
    pub server: ServerId,
    /// How external addresses are divided.
    pub widths: AddressWidths,
    /// Threads that serve connections, at least one.
    pub workers: usize,
    /// How long at most a worker that has just served looks for more before it sleeps. To wake a
    /// sleeping processor takes 50 to 190 microseconds on a virtual machine, and a sleep that was longer than
    /// this counts as one that looking out could not have spared. 0: never.
    pub spin: Duration,
    /// Whether to serve before other programs of this machine, as far as the system permits it: for a
    /// server that programs on the same machine wait for, which may be busy beyond measure.
    pub urgent: bool,
    /// Whether a client over a Unix socket may map the arena. Such a client reaches all memory
    /// of the server, so this is for a server with one tenant.
    pub share_arena: bool,
    /// Where to answer HTTP requests for metrics, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// See [`Limits`].
    pub limits: Limits,
    /// Where log lines go.
    pub log: LogSink,
}

impl ServerConfig {
    /// A server with default limits that says nothing.
    #[must_use]
    pub fn new(listen: Vec<Endpoint>, memory: ByteCount) -> Self {
        Self {
            listen,
            memory,
            memory_left: None,
            tiers: TierConfig::default(),
            promise_percent: 100,
            promise_max: None,
            data: None,
            directories: Vec::new(),
            neighbours: None,
            server: ServerId::new(0),
            widths: AddressWidths::DEFAULT,
            workers: 1,
            spin: Duration::from_micros(200),
            urgent: false,
            share_arena: false,
            metrics: None,
            limits: Limits::default(),
            log: LogSink::silent(),
        }
    }
}

/// Where pages go that are cold when memory gets short.
#[derive(Debug, Clone, Default)]
pub struct TierConfig {
    /// Bytes of pages that may be kept compressed, as they were before. They take the room that
    /// they need in the server's memory.
    pub compressed: ByteCount,
    /// A file.
    pub file: Option<FileTierConfig>,
}

/// A file on disk for cold pages.
#[derive(Debug, Clone)]
pub struct FileTierConfig {
    /// Where the file, which has no name, is made.
    pub directory: PathBuf,
    /// How long it may become.
    pub size: ByteCount,
}

impl ServerConfig {
    /// Bytes that the server lends at most: what its tiers hold, times what may be promised beyond
    /// that. Compressed pages count as the room that they may fill, as they save memory only if
    /// they can be compressed: who promises that takes the risk.
    #[must_use]
    pub fn promise(&self) -> ByteCount {
        let file = self.tiers.file.as_ref().map_or(0, |file| file.size.get());
        let all = self.memory.get().max(self.tiers.compressed.get()).saturating_add(file);
        let promise = u128::from(all) * u128::from(self.promise_percent) / 100;
        let promise = ByteCount::new(u64::try_from(promise).unwrap_or(u64::MAX));
        self.promise_max.map_or(promise, |most| most.min(promise))
    }
}

/// Every bound of a memory server, so that no client can exhaust it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at one time; one more is closed at once. Each costs about 20 KiB.
    pub connections_max: usize,
    /// Sessions at one time; one more setup is refused as busy.
    pub sessions_max: usize,
    /// Connections attached to one session.
    pub connections_per_session_max: usize,
    /// Memory, beyond what is lent, for pages on their way in: a write needs its new slots before
    /// the old ones are free. Writes beyond it are refused as busy and may be repeated.
    pub inflight_bytes: ByteCount,
    /// The part of `inflight_bytes` that one session may hold with writes that have not arrived
    /// whole, and as much again with replies that wait: one `session_share`th, but at least the
    /// longest message, or what one connection may hold. Further writes are refused as busy,
    /// further requests not read until replies have gone.
    pub session_share: u64,
    /// Bytes of replies that wait for one connection; beyond it no more is read from there.
    pub output_bytes_max: usize,
    /// A peer must say hello within this time.
    pub hello_timeout: Duration,
    /// A message must be complete this long after its first byte.
    pub message_timeout: Duration,
    /// Replies that wait must all have been sent after this time, or twice that if more came
    /// meanwhile.
    pub output_timeout: Duration,
    /// The same where so many replies wait for the clients of one named region that none of them is
    /// served any more.
    pub crowded_output_timeout: Duration,
    /// A session without a connection lives this long.
    pub session_timeout: Duration,
    /// A journal longer than this is rewritten, if it is also three times longer than it was when it
    /// was last rewritten. All that are connected wait meanwhile, some tens of nanoseconds for each
    /// page that is stored. The disk must hold the old and the new one.
    pub journal_bytes: ByteCount,
    /// A connection to the port for metrics ends this long after it was accepted, whatever has
    /// been asked and answered.
    pub metrics_timeout: Duration,
}

impl Limits {
    /// Slots that a session's writes may hold on their way in.
    pub(crate) fn session_slots_max(&self) -> u32 {
        let share = self.inflight_bytes.pages_rounded_up().get() / self.session_share.max(1);
        u32::try_from(share).unwrap_or(u32::MAX).max(PAGES_PER_MESSAGE_MAX as u32)
    }

    /// Bytes of replies that may wait for all connections of a session.
    pub(crate) fn session_output_bytes_max(&self) -> usize {
        let share = self.inflight_bytes.get() / self.session_share.max(1);
        usize::try_from(share).unwrap_or(usize::MAX).max(self.output_bytes_max)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            sessions_max: 4096,
            connections_per_session_max: 64,
            inflight_bytes: ByteCount::new(64 << 20),
            session_share: 16,
            output_bytes_max: 4 << 20,
            hello_timeout: Duration::from_secs(5),
            message_timeout: Duration::from_secs(10),
            output_timeout: Duration::from_secs(10),
            crowded_output_timeout: Duration::from_secs(1),
            session_timeout: Duration::from_secs(10),
            journal_bytes: ByteCount::new(64 << 20),
            metrics_timeout: Duration::from_secs(5),
        }
    }
}

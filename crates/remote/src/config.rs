//! What a store is told, and what it tells of its session.

use farmem_region::{ByteCount, Epoch, Incarnation, PageCount, RegionId, SessionId};
use farmem_transport::Endpoint;

/// How to reach a server and what to ask of it.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// The server.
    pub server: Endpoint,
    /// What the client calls itself, for the server's log and listings.
    pub name: String,
    /// The session on the same server whose region this one's begins as a copy of, instead of empty.
    pub copy_of: Option<SessionKey>,
    /// Bytes to reserve. A copy gets at least what its original has.
    pub amount: ByteCount,
    /// Whether less is welcome too.
    pub accept_partial: bool,
    /// Whether the reservation may grow when the region outgrows it.
    pub dynamic: bool,
    /// Whether to map the arena of a server on this machine that offers it.
    pub share_arena: bool,
    /// See [`Timeouts`].
    pub timeouts: Timeouts,
}

impl RemoteConfig {
    /// Asks for `amount` bytes, all of them, with the default times.
    #[must_use]
    pub fn new(server: Endpoint, name: impl Into<String>, amount: ByteCount) -> Self {
        let timeouts = match server {
            Endpoint::Tcp(_) => Timeouts::default(),
            Endpoint::Unix(_) => Timeouts::same_machine(),
        };
        Self {
            server,
            name: name.into(),
            copy_of: None,
            amount,
            accept_partial: false,
            dynamic: false,
            share_arena: true,
            timeouts,
        }
    }
}

/// Every time that a store waits, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Connecting for the first time, hello and setup together; then each reply that tells a region's map.
    pub connect_us: u64,
    /// While requests wait for replies and nothing has been heard this long, a ping is sent.
    pub heartbeat_us: u64,
    /// While requests wait for replies and nothing has been heard this long, the connection is
    /// taken for broken: TCP itself takes many seconds to see that a peer's machine is gone.
    pub silence_us: u64,
    /// One attempt to connect again.
    pub attempt_us: u64,
    /// How long a server at whose address nobody listens is taken for one that may come back.
    /// Short: the program that waits is told within a second.
    pub refused_us: u64,
    /// All attempts to connect again together. Below the 10 seconds that the server keeps a
    /// session without a connection. So long a request is repeated, too, that the server refuses because the
    /// server that the region is made from is away.
    pub reconnect_us: u64,
    /// How long a request is repeated that the server refuses as busy.
    pub busy_us: u64,
    /// How long a free is: it waits for a flush that is writing one of its pages, for as long as a disk, or
    /// the server behind the server, takes for that.
    pub busy_free_us: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect_us: 5_000_000,
            heartbeat_us: 100_000,
            silence_us: 1_000_000,
            attempt_us: 1_000_000,
            refused_us: 500_000,
            reconnect_us: 8_000_000,
            busy_us: 5_000_000,
            busy_free_us: 60_000_000,
        }
    }
}

impl Timeouts {
    /// For a server on this machine. The kernel tells at once when its process ends, and no network
    /// can lose anything, so that silence says only that it is not let run: on a machine with many
    /// times more to do than it can, for seconds.
    #[must_use]
    pub fn same_machine() -> Self {
        Self { silence_us: 10_000_000, attempt_us: 4_000_000, ..Self::default() }
    }
}

/// What proves the right to use a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionKey {
    /// The session.
    pub session: SessionId,
    /// Its secret.
    pub token: u64,
    /// The epoch of its region.
    pub epoch: Epoch,
    /// The server process.
    pub incarnation: Incarnation,
}

/// All that is needed to use or end a session from elsewhere: the supervisor keeps it to
/// disconnect the session of a program that died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// The server.
    pub server: Endpoint,
    /// The session.
    pub session: SessionId,
    /// Proves the right to use the session.
    pub token: u64,
    /// The epoch of the region.
    pub epoch: Epoch,
    /// The server process.
    pub incarnation: Incarnation,
    /// The session's region.
    pub region: RegionId,
    /// Bytes reserved.
    pub granted: ByteCount,
    /// Pages of the region.
    pub pages: PageCount,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that is busy beyond measure does not let a server run for seconds; the end of its
    /// process is told by the socket, so that nobody waits for one that is gone.
    #[test]
    fn a_server_on_the_same_machine_may_be_silent_for_long() {
        let silence_us =
            |server| RemoteConfig::new(server, "test", ByteCount::new(0)).timeouts.silence_us;
        assert_eq!(silence_us(Endpoint::Unix("/run/server".into())), 10_000_000);
        assert_eq!(silence_us(Endpoint::Tcp(([127, 0, 0, 1], 1).into())), 1_000_000);
    }
}

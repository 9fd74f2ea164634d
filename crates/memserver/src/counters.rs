//! What the server counts, and why it dropped peers.

use std::sync::atomic::{AtomicU64, Ordering};

use farmem_wire::{DecodeError, ServerStat};

macro_rules! counters {
    ($($name:ident,)*) => {
        /// Counters since the start; gauges are asked where they live.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            /// Fills the counters' part of a stat.
            pub(crate) fn fill(&self, stat: &mut ServerStat) {
                $(stat.$name = self.$name.load(Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    connections,
    requests,
    reads,
    writes,
    pages_read,
    pages_written,
    bytes_in,
    bytes_out,
    refusals,
    damaged_pages,
    connections_accepted,
    connections_refused,
    sessions_timed_out,
    bad_magic,
    bad_header_crc,
    bad_body_crc,
    too_large,
    bad_version,
    silent_peers,
    stalled_peers,
    slow_readers,
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// Why a connection ends from our side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DropReason {
    #[error("the peer has closed the connection")]
    Closed,
    #[error("the connection broke")]
    Broken(#[source] std::io::Error),
    #[error(transparent)]
    BadFrame(#[from] DecodeError),
    #[error("it sent a reply instead of a request")]
    NotARequest,
    #[error("it speaks protocol versions {oldest} to {newest} only")]
    Version { oldest: u16, newest: u16 },
    #[error("it did not say hello in time")]
    Silent,
    #[error("it did not finish a message in time")]
    Stalled,
    #[error("it did not take its replies in time")]
    SlowReader,
}

impl DropReason {
    /// Whether the peer misbehaved, so that a person may want to know.
    pub(crate) const fn is_worth_a_line(&self) -> bool {
        !matches!(self, Self::Closed | Self::Broken(_))
    }

    pub(crate) fn count(&self, counters: &Counters) {
        let counter = match self {
            Self::Closed | Self::Broken(_) => return,
            Self::BadFrame(DecodeError::Magic(_)) | Self::NotARequest => &counters.bad_magic,
            Self::BadFrame(DecodeError::HeaderCrc { .. }) => &counters.bad_header_crc,
            Self::BadFrame(DecodeError::BodyCrc { .. }) => &counters.bad_body_crc,
            Self::BadFrame(DecodeError::TooLarge { .. }) => &counters.too_large,
            Self::BadFrame(DecodeError::Version(_)) | Self::Version { .. } => &counters.bad_version,
            Self::Silent => &counters.silent_peers,
            Self::Stalled => &counters.stalled_peers,
            Self::SlowReader => &counters.slow_readers,
        };
        count(counter, 1);
    }
}

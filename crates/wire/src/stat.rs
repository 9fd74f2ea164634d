//! How a memory server is: the body of the answer to stat.

use crate::body::{BodyError, Fields};

macro_rules! counters {
    ($(#[$type_doc:meta])* $type:ident, $count:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$type_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $type {
            $($(#[$doc])* pub $name: u64,)*
        }

        const $count: usize = [$(stringify!($name)),*].len();

        impl $type {
            /// Names of the fields, in their order on the wire.
            pub const NAMES: [&'static str; $count] = [$(stringify!($name)),*];

            /// The fields in their order on the wire.
            #[must_use]
            pub const fn values(&self) -> [u64; $count] {
                [$(self.$name),*]
            }

            /// From the fields in their order on the wire.
            #[must_use]
            pub const fn from_values(values: [u64; $count]) -> Self {
                let [$($name),*] = values;
                Self { $($name),* }
            }
        }
    };
}

counters! {
    /// Gauges and counters of a memory server. New fields are appended, none is ever removed.
    ServerStat, STAT_FIELDS {
        /// Bytes that the server lends at most.
        memory_bytes,
        /// Bytes promised to sessions.
        reserved_bytes,
        /// Bytes of pages that are stored.
        used_bytes,
        /// Sessions.
        sessions,
        /// Sessions that no connection is attached to.
        orphaned_sessions,
        /// Connections.
        connections,
        /// Pages stored.
        pages,
        /// Slots taken in the arena: pages stored, being received and being sent.
        slots,
        /// Requests answered, of any kind.
        requests,
        /// Reads answered.
        reads,
        /// Writes answered.
        writes,
        /// Pages sent.
        pages_read,
        /// Pages received and kept.
        pages_written,
        /// Bytes received.
        bytes_in,
        /// Bytes sent.
        bytes_out,
        /// Requests refused.
        refusals,
        /// Pages refused because what was stored did not match their checksum.
        damaged_pages,
        /// Connections accepted since the start.
        connections_accepted,
        /// Connections turned away because there were too many.
        connections_refused,
        /// Sessions ended because no connection came back in time.
        sessions_timed_out,
        /// Peers dropped because what they sent was no message.
        bad_magic,
        /// Peers dropped because a header was damaged.
        bad_header_crc,
        /// Peers dropped because entries or a body were damaged.
        bad_body_crc,
        /// Peers dropped because a message was too large.
        too_large,
        /// Peers dropped because of the protocol version.
        bad_version,
        /// Peers dropped because they connected and said nothing.
        silent_peers,
        /// Peers dropped because they began a message and did not finish it.
        stalled_peers,
        /// Peers dropped because they did not take their replies.
        slow_readers,
    }
}

/// Bytes of the longest stat body that this version makes.
pub const STAT_BYTES_MAX: usize = 4 + 8 * STAT_FIELDS;

const _: () = assert!(STAT_BYTES_MAX <= crate::BODY_BYTES_MAX);

impl ServerStat {
    /// Appends the body's bytes: the number of fields, then the fields.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(STAT_FIELDS as u32).to_le_bytes());
        for value in self.values() {
            out.extend_from_slice(&value.to_le_bytes());
        }
    }

    /// Reads a body; fields that an older server does not know are 0.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let count = Fields::of(body, 4)?.u32() as usize;
        let mut fields = Fields::of(&body[4..], count.saturating_mul(8))?;
        let mut values = [0; STAT_FIELDS];
        for value in values.iter_mut().take(count) {
            *value = fields.u64();
        }
        Ok(Self::from_values(values))
    }
}

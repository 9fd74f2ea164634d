//! How a memory server is: the body of the answer to stat.

use crate::body::{BodyError, Fields};
use crate::{Action, BODY_BYTES_MAX, RefusalCode};

macro_rules! counters {
    ($(#[$type_doc:meta])* $type:ident, $count:ident { $($(#[doc = $doc:literal])* $name:ident,)* }) => {
        $(#[$type_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $type {
            $($(#[doc = $doc])* pub $name: u64,)*
        }

        const $count: usize = [$(stringify!($name)),*].len();

        impl $type {
            /// Names of the fields, in their order on the wire.
            pub const NAMES: [&'static str; $count] = [$(stringify!($name)),*];

            /// What the fields mean, for people, in the same order.
            pub const MEANINGS: [&'static str; $count] = [$(concat!($($doc),*)),*];

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
        /// Bytes of memory for pages.
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
        /// Half of the reads were answered within this time, in nanoseconds from their arrival to
        /// their reply's being ready: a bound that is at most twice the true one, or 0 if there
        /// were none.
        read_p50_nanos,
        /// The same for 99 of 100 reads.
        read_p99_nanos,
        /// The same for half of the writes, from the arrival of their last byte.
        write_p50_nanos,
        /// The same for 99 of 100 writes.
        write_p99_nanos,
        /// Bytes that may be promised to sessions and named regions.
        promise_bytes,
        /// Named regions.
        regions,
        /// Pages that are pinned.
        pinned_pages,
        /// Pages that are kept compressed.
        compressed_pages,
        /// Bytes of memory that compressed pages take.
        compressed_bytes,
        /// Bytes of pages in the file tier.
        file_bytes,
        /// Pages moved to a slower tier.
        demoted_pages,
        /// Pages moved back because they were asked for.
        promoted_pages,
        /// Pages that a slower tier did not give back, or did not take.
        tier_failures,
        /// Bytes of memory that tables take, which say where pages lie: beside what is lent.
        table_bytes,
    }
}

/// Bytes of the fields of a stat body.
const STAT_FIELDS_BYTES: usize = 4 + 8 * STAT_FIELDS;

/// Bytes of one [`StatCount`].
const STAT_COUNT_BYTES: usize = 12;

/// Counts that a stat body has room for behind its fields. Those of more kinds than a server ever
/// sees in its life.
pub const STAT_COUNTS_MAX: usize = (BODY_BYTES_MAX - STAT_FIELDS_BYTES) / STAT_COUNT_BYTES;

const _: () = assert!(STAT_COUNTS_MAX >= 32);

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

/// What a [`StatCount`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountOf {
    /// Requests for an action that were granted.
    Granted(Action),
    /// Requests for an action that were refused.
    Refused(Action),
    /// Refusals with a code.
    Refusals(RefusalCode),
}

/// A count of one kind of requests since the server's start. They follow the fields of a stat
/// body; kinds of which there was none are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatCount {
    /// Of what.
    pub of: CountOf,
    /// How many.
    pub count: u64,
}

impl StatCount {
    /// Appends as many counts as there is room for behind the fields.
    pub fn encode_all(counts: impl Iterator<Item = Self>, out: &mut Vec<u8>) {
        for Self { of, count } in counts.take(STAT_COUNTS_MAX) {
            let (kind, number) = match of {
                CountOf::Granted(action) => (1u16, u16::from(action.number())),
                CountOf::Refused(action) => (2, u16::from(action.number())),
                CountOf::Refusals(code) => (3, code.number()),
            };
            out.extend_from_slice(&kind.to_le_bytes());
            out.extend_from_slice(&number.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
        }
    }

    /// Reads the counts of a stat body; those of kinds that a newer server knows are left out.
    pub fn decode_all(body: &[u8]) -> impl Iterator<Item = Self> + '_ {
        let fields = body.first_chunk().map_or(0, |count| u32::from_le_bytes(*count) as usize);
        let counts = body.get(fields.saturating_mul(8).saturating_add(4)..).unwrap_or_default();
        counts.as_chunks::<STAT_COUNT_BYTES>().0.iter().filter_map(|bytes| {
            let [kind0, kind1, number0, number1, count @ ..] = *bytes;
            let number = u16::from_le_bytes([number0, number1]);
            let action = u8::try_from(number).map(Action::from_number);
            let of = match u16::from_le_bytes([kind0, kind1]) {
                1 => CountOf::Granted(action.ok()?),
                2 => CountOf::Refused(action.ok()?),
                3 => CountOf::Refusals(RefusalCode::from_number(number)),
                _ => return None,
            };
            Some(Self { of, count: u64::from_le_bytes(count) })
        })
    }
}

//! The header, the same 80 bytes in every message.

use farmem_region::{Epoch, Incarnation, PAGE_SIZE, RegionId, SessionId};

use crate::{
    BODY_BYTES_MAX, PAGE_ENTRY_BYTES, PAGES_PER_MESSAGE_MAX, PARTS_BYTES_MAX,
    PARTS_PER_MESSAGE_MAX, RANGES_PER_MESSAGE_MAX, RefusalCode, crc32c,
};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 80;

/// The first four bytes of every message.
pub const MAGIC: [u8; 4] = *b"MSMP";

/// Where the CRC of entries and body stands.
const BODY_CRC_AT: usize = 72;
/// Where the CRC of the header stands; it covers all bytes before.
const HEADER_CRC_AT: usize = 76;

/// Bit of the flags byte: the message is a reply.
const FLAG_REPLY: u8 = 1;
/// Bit of the flags byte: see [`Header::leased`].
const FLAG_LEASED: u8 = 2;
/// Bit of the flags byte: see [`Header::news`].
const FLAG_NEWS: u8 = 4;

/// Versions of the protocol, one line for each change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum ProtocolVersion {
    /// Hello, setup, attach, malloc, read, write, free, disconnect, stat, ping; slots and commit
    /// for a client that maps the server's arena; named regions with virtual copies and files.
    V1 = 1,
}

impl ProtocolVersion {
    /// The newest version that this program speaks.
    pub const NEWEST: Self = Self::V1;

    /// The number in a header.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }
}

macro_rules! actions {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a request asks for. Numbers are permanent; those of actions to come are reserved.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Action {
            $($(#[$doc])* $name,)*
            /// An action that this version of the program does not know.
            Unknown(u8),
        }

        impl Action {
            /// From the number in a header.
            #[must_use]
            pub const fn from_number(number: u8) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }

            /// A word for people and programs, in lower case.
            #[must_use]
            pub fn name(self) -> String {
                match self {
                    $(Self::$name => crate::snake_case(stringify!($name)),)*
                    Self::Unknown(_) => "unknown".to_owned(),
                }
            }

            /// The number in a header.
            #[must_use]
            pub const fn number(self) -> u8 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Unknown(number) => number,
                }
            }
        }
    };
}

actions! {
    /// Negotiates the version; the first message of every connection.
    Hello = 1,
    /// Reserves memory and starts a session.
    Setup = 2,
    /// Binds a session that exists to this connection.
    Attach = 3,
    /// Makes a region larger.
    Malloc = 4,
    /// Asks for pages.
    Read = 5,
    /// Stores pages.
    Write = 6,
    /// Forgets pages.
    Free = 7,
    /// Ends a session and frees all that it holds.
    Disconnect = 8,
    /// Asks how the server is.
    Stat = 9,
    /// Asks for an answer.
    Ping = 10,
    /// Asks for fresh slots of the arena to write into (shared memory on one machine).
    Slots = 11,
    /// Stores pages that the client has written into its slots.
    Commit = 12,
    /// Makes a named region, which lives until it is deleted.
    Create = 13,
    /// Attaches the connection to a named region.
    Open = 14,
    /// Lists the named regions.
    List = 15,
    /// Tells all about the region that the connection is attached to.
    Show = 16,
    /// Deletes the region that the connection is attached to.
    Delete = 17,
    /// Fills ranges from the region's source.
    Initialise = 18,
    /// Lets ranges leave dram again.
    Unpin = 19,
    /// Makes a named region larger or smaller.
    Resize = 20,
    /// Says in which tier ranges are to be kept.
    Prefer = 21,
    /// Asks for parts of pages.
    ReadParts = 22,
    /// Stores parts of pages.
    WriteParts = 23,
    /// Forgets parts of pages.
    FreeParts = 24,
    /// Reserved: detach a session without ending it.
    Detach = 32,
    /// Fills ranges and keeps them in dram.
    Pin = 33,
    /// Fills ranges and brings them into dram.
    Prefetch = 34,
    /// Makes ranges absent: they hold what the region's source says.
    Invalidate = 35,
    /// Makes a writable virtual copy of a region.
    Clone = 36,
    /// Makes a frozen virtual copy of a region.
    Snapshot = 37,
    /// Writes what is dirty to the backing file, and waits until the disk has it.
    Flush = 38,
    /// Reserved: copy between blocks.
    Copy = 39,
    /// Reserved: atomic compare and swap.
    CompareAndSwap = 40,
    /// Reserved: atomic fetch and add.
    FetchAndAdd = 41,
    /// Reserved: tell an observer.
    Notify = 42,
    /// Tells which pages of a region are stored.
    Map = 43,
    /// Makes a backup of the region that the connection is attached to.
    Backup = 44,
    /// Makes a named region from a backup.
    Restore = 45,
}

impl Action {
    /// Whether version 1 answers the action with anything but "unsupported".
    #[must_use]
    pub const fn is_served(self) -> bool {
        matches!(self.number(), 1..=24 | 33..=38 | 43..=45)
    }
}

/// What follows the entries of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// As many whole pages as there are entries; covered by the pages' checksums.
    Pages,
    /// At most [`BODY_BYTES_MAX`] bytes; covered by the header's `body_crc`.
    Body,
    /// Parts of pages, one after the other, for at most [`PARTS_PER_MESSAGE_MAX`] entries; at most
    /// [`PARTS_BYTES_MAX`] bytes, covered by the header's `body_crc`.
    Parts,
}

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Version of the protocol.
    pub version: u16,
    /// The action asked for, or answered.
    pub action: Action,
    /// Whether this is a reply.
    pub reply: bool,
    /// In a reply: what the client knows of the region is still so, and will be for
    /// [`MAP_LEASE`](crate::MAP_LEASE) from when it sent the request.
    pub leased: bool,
    /// Tells what has changed of the map, ahead of the reply to the same request: a message of its own,
    /// which a client gets that has asked for it.
    pub news: bool,
    /// Chosen by the client, repeated in the reply.
    pub request: u64,
    /// The session, 0 before there is one.
    pub session: SessionId,
    /// The region that pages belong to.
    pub region: RegionId,
    /// The epoch in which the client believes to be.
    pub epoch: Epoch,
    /// The server process that the client means.
    pub incarnation: Incarnation,
    /// Proves the right to use the session.
    pub token: u64,
    /// Entries after the header.
    pub entries: u32,
    /// Bytes after the entries.
    pub payload: u32,
    /// Why the server refuses; `None` in a request and in a reply that grants.
    pub refusal: Option<RefusalCode>,
    /// Time that the server spent on the request, in a reply; saturates.
    pub server_nanos: u32,
    /// CRC32C of entries and body.
    pub body_crc: u32,
}

/// Why bytes are not a message. The connection that carried them ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Another protocol.
    #[error("not an MSMP message (it starts with {0:02x?})")]
    Magic([u8; 4]),
    /// Damaged on its way.
    #[error("header damaged: its CRC is {found:08x}, it should be {expected:08x}")]
    HeaderCrc {
        /// In the header.
        found: u32,
        /// Of the header's bytes.
        expected: u32,
    },
    /// Damaged on its way.
    #[error("entries or body damaged: the CRC is {found:08x}, it should be {expected:08x}")]
    BodyCrc {
        /// In the header.
        found: u32,
        /// Of the bytes.
        expected: u32,
    },
    /// Larger than any message may be.
    #[error("{action:?} with {entries} entries and {payload} bytes of payload is not allowed")]
    TooLarge {
        /// The action.
        action: Action,
        /// Entries announced.
        entries: u32,
        /// Bytes announced.
        payload: u32,
    },
    /// A newer program, or an older one, that did not negotiate.
    #[error("protocol version {0} is not spoken here")]
    Version(u16),
}

impl Header {
    /// A request with nothing but its action.
    #[must_use]
    pub const fn request(action: Action, request: u64) -> Self {
        Self {
            version: ProtocolVersion::NEWEST.number(),
            action,
            reply: false,
            leased: false,
            news: false,
            request,
            session: SessionId::new(0),
            region: RegionId::new(0),
            epoch: Epoch::new(0),
            incarnation: Incarnation::new(0),
            token: 0,
            entries: 0,
            payload: 0,
            refusal: None,
            server_nanos: 0,
            body_crc: 0,
        }
    }

    /// The reply that grants this request, with no entries and no payload yet. The token is not
    /// repeated.
    #[must_use]
    pub const fn granted(&self) -> Self {
        Self { reply: true, news: false, token: 0, entries: 0, payload: 0, refusal: None, ..*self }
    }

    /// The reply that refuses this request.
    #[must_use]
    pub const fn refused(&self, code: RefusalCode) -> Self {
        Self { refusal: Some(code), leased: false, ..self.granted() }
    }

    /// What kind of payload the message has.
    #[must_use]
    pub const fn payload_kind(&self) -> Payload {
        match (self.action, self.reply, self.refusal.is_some()) {
            (Action::Write, false, _) | (Action::Read, true, false) => Payload::Pages,
            (Action::WriteParts, false, _) | (Action::ReadParts, true, false) => Payload::Parts,
            _ => Payload::Body,
        }
    }

    /// Bytes of the entries.
    #[must_use]
    pub const fn entry_bytes(&self) -> usize {
        self.entries as usize * PAGE_ENTRY_BYTES
    }

    /// Bytes of the payload.
    #[must_use]
    pub const fn payload_bytes(&self) -> usize {
        self.payload as usize
    }

    /// Bytes after the header that `body_crc` covers.
    #[must_use]
    pub const fn covered_bytes(&self) -> usize {
        match self.payload_kind() {
            Payload::Pages => self.entry_bytes(),
            Payload::Body | Payload::Parts => self.entry_bytes() + self.payload_bytes(),
        }
    }

    /// Bytes of the whole message.
    #[must_use]
    pub const fn message_bytes(&self) -> usize {
        HEADER_BYTES + self.entry_bytes() + self.payload_bytes()
    }

    /// The header's bytes, its CRC included.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[6] = self.action.number();
        let flags = [(self.reply, FLAG_REPLY), (self.leased, FLAG_LEASED), (self.news, FLAG_NEWS)];
        out[7] = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum();
        out[8..16].copy_from_slice(&self.request.to_le_bytes());
        out[16..24].copy_from_slice(&self.session.get().to_le_bytes());
        out[24..32].copy_from_slice(&self.region.get().to_le_bytes());
        out[32..40].copy_from_slice(&self.epoch.get().to_le_bytes());
        out[40..48].copy_from_slice(&self.incarnation.get().to_le_bytes());
        out[48..56].copy_from_slice(&self.token.to_le_bytes());
        out[56..60].copy_from_slice(&self.entries.to_le_bytes());
        out[60..64].copy_from_slice(&self.payload.to_le_bytes());
        let status = self.refusal.map_or(0, RefusalCode::number);
        out[64..66].copy_from_slice(&status.to_le_bytes());
        out[68..72].copy_from_slice(&self.server_nanos.to_le_bytes());
        out[BODY_CRC_AT..HEADER_CRC_AT].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c(&out[..HEADER_CRC_AT]);
        out[HEADER_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`DecodeError`]; nothing after such a header can be understood.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let magic = field(bytes, 0);
        if magic != MAGIC {
            return Err(DecodeError::Magic(magic));
        }
        let found = u32::from_le_bytes(field(bytes, HEADER_CRC_AT));
        let expected = crc32c(&bytes[..HEADER_CRC_AT]);
        if found != expected {
            return Err(DecodeError::HeaderCrc { found, expected });
        }
        let status = u16::from_le_bytes(field(bytes, 64));
        let header = Self {
            version: u16::from_le_bytes(field(bytes, 4)),
            action: Action::from_number(bytes[6]),
            reply: bytes[7] & FLAG_REPLY != 0,
            leased: bytes[7] & FLAG_LEASED != 0,
            news: bytes[7] & FLAG_NEWS != 0,
            request: word(bytes, 8),
            session: SessionId::new(word(bytes, 16)),
            region: RegionId::new(word(bytes, 24)),
            epoch: Epoch::new(word(bytes, 32)),
            incarnation: Incarnation::new(word(bytes, 40)),
            token: word(bytes, 48),
            entries: u32::from_le_bytes(field(bytes, 56)),
            payload: u32::from_le_bytes(field(bytes, 60)),
            refusal: (status != 0).then(|| RefusalCode::from_number(status)),
            server_nanos: u32::from_le_bytes(field(bytes, 68)),
            body_crc: u32::from_le_bytes(field(bytes, BODY_CRC_AT)),
        };
        header.check_lengths()?;
        Ok(header)
    }

    /// Fails unless the message keeps the limits of its kind.
    fn check_lengths(&self) -> Result<(), DecodeError> {
        let entries = self.entries as usize;
        let fits = match self.payload_kind() {
            Payload::Pages => {
                entries <= PAGES_PER_MESSAGE_MAX && self.payload_bytes() == entries * PAGE_SIZE
            }
            Payload::Body => {
                entries <= RANGES_PER_MESSAGE_MAX.max(PAGES_PER_MESSAGE_MAX)
                    && self.payload_bytes() <= BODY_BYTES_MAX
            }
            Payload::Parts => {
                entries <= PARTS_PER_MESSAGE_MAX && self.payload_bytes() <= PARTS_BYTES_MAX
            }
        };
        if fits {
            return Ok(());
        }
        Err(DecodeError::TooLarge {
            action: self.action,
            entries: self.entries,
            payload: self.payload,
        })
    }
}

/// Completes a message that was built in `message`: [`HEADER_BYTES`] bytes of room, then entries,
/// then the body if its payload is one. Pages are not in it. Sets the lengths of the body and the
/// CRC, and writes the header into the room.
///
/// # Panics
/// If the message is shorter than its header and entries.
pub fn seal(mut header: Header, message: &mut [u8]) {
    let covered = &message[HEADER_BYTES..];
    if header.payload_kind() != Payload::Pages {
        let body = covered.len() - header.entry_bytes();
        header.payload = u32::try_from(body).expect("a body has at most BODY_BYTES_MAX bytes");
    }
    assert_eq!(covered.len(), header.covered_bytes(), "entries and body as announced");
    header.body_crc = crc32c(covered);
    message[..HEADER_BYTES].copy_from_slice(&header.encode());
}

/// Checks the bytes that a header's `body_crc` covers.
///
/// # Errors
/// [`DecodeError::BodyCrc`] if they were damaged.
pub fn verify_body(header: &Header, covered: &[u8]) -> Result<(), DecodeError> {
    let expected = crc32c(covered);
    if header.body_crc == expected {
        return Ok(());
    }
    Err(DecodeError::BodyCrc { found: header.body_crc, expected })
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn word(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

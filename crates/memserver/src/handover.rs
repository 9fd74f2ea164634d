//! A server process hands all that it serves over to another one, which may be of another build.
//!
//! ```text
//!  predecessor, which serves                    successor, which has just been started
//!            <------------------------ Hello     versions: what it understands
//!  all connections close, nothing changes
//!  Given, descriptors ------------------------>  makes its tables
//!            <------------------------ Ready
//!  Yours ------------------------------------->  makes its journal the one that counts
//!            <------------------------ Taken
//!  ends                                          serves
//! ```
//!
//! The memory, the file tier, the listening sockets and the lock of the directory for data go over as
//! descriptors; what the tables say as records of the journal. Until `Yours` is sent the predecessor
//! may change its mind, and the successor serves nobody before; after it the predecessor serves again
//! only if the successor says that it does not, or is gone, before `Taken`. So at most one serves at
//! any instant, and if anything fails the predecessor goes on.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use farmem_region::{ByteCount, Incarnation};
use farmem_transport::{Arrival, PACKET_BYTES_MAX, PASSED_MAX, Passage};
use rustix::fs::MemfdFlags;

use crate::journal::RECORDS_VERSION;

const MAGIC: [u8; 8] = *b"FMHANDOV";
/// Version 1 of the packets. Another one is refused before anything happens.
const VERSION: u32 = 1;
/// Bytes of what says which packet it is.
const HEAD_BYTES: usize = 12;
const GIVEN_BYTES: usize = 40;

/// How long a successor may take to start, before anybody is disturbed.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take with its tables: clients wait for 8 seconds.
const READY_PATIENCE: Duration = Duration::from_secs(6);
/// Addresses and descriptors of other kinds that one packet takes along.
const LISTENERS_MAX: usize = PASSED_MAX - 5;

/// Why a hand-over does not come about. The predecessor goes on.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The kernel says no.
    #[error("cannot hand over")]
    Io(#[from] io::Error),
    /// The other process says why.
    #[error("the other process refuses: {0}")]
    Refused(String),
    /// The other process has ended.
    #[error("the other process has ended")]
    Gone,
    /// The other process does nothing.
    #[error("the other process did not answer in time")]
    Late,
    /// It speaks of something else.
    #[error("the other process says what this one does not understand")]
    NotUnderstood,
    /// It is of a build that hands over in another way.
    #[error(
        "the other process hands over by version {theirs}, this one by version {VERSION}.{RECORDS_VERSION}: \
         stop the server and start the other build"
    )]
    Version {
        /// What it has instead.
        theirs: String,
    },
    /// What is handed over does not fit.
    #[error("{0}")]
    DoesNotFit(String),
    /// Not now.
    #[error("{0}")]
    NotNow(&'static str),
}

/// What one process tells the other one.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Packet {
    Hello { version: u32, records: u32 },
    Given(Given),
    Ready,
    Yours,
    Taken,
    Refused(String),
}

/// All about a server but its tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) slots: u32,
    pub(crate) has_file: bool,
    pub(crate) has_data: bool,
    pub(crate) has_metrics: bool,
    pub(crate) incarnation: Incarnation,
    pub(crate) next_session: u64,
    /// What the server was told to lend.
    pub(crate) memory: ByteCount,
}

/// What goes over beside [`Given`].
pub(crate) struct Parts<'a> {
    pub(crate) arena: BorrowedFd<'a>,
    /// Records of the journal.
    pub(crate) records: Vec<u8>,
    pub(crate) file: Option<BorrowedFd<'a>>,
    /// The lock of the directory for data.
    pub(crate) lock: Option<BorrowedFd<'a>>,
    pub(crate) metrics: Option<BorrowedFd<'a>>,
    pub(crate) listeners: Vec<BorrowedFd<'a>>,
}

/// What a running server has handed over. It serves again if this is dropped.
#[derive(Debug)]
pub struct Handed {
    passage: Passage,
    pub(crate) given: Given,
    pub(crate) arena: Option<OwnedFd>,
    pub(crate) records: Vec<u8>,
    pub(crate) file: Option<OwnedFd>,
    pub(crate) lock: Option<OwnedFd>,
    pub(crate) metrics: Option<OwnedFd>,
    pub(crate) listeners: Vec<OwnedFd>,
}

impl Handed {
    /// Asks the server at the other end of a passage for all that it serves, and gets it. From then
    /// on nobody is served until this process, or that one again, does.
    ///
    /// # Errors
    /// [`HandOverError`].
    pub fn receive(passage: Passage) -> Result<Self, HandOverError> {
        let hello = Packet::Hello { version: VERSION, records: RECORDS_VERSION };
        send(&passage, &hello, &[])?;
        let (Packet::Given(given), passed) = receive(&passage, None)? else {
            return Err(HandOverError::NotUnderstood);
        };
        let mut passed = passed.into_iter();
        let mut next = || passed.next().ok_or(HandOverError::NotUnderstood);
        let arena = Some(next()?);
        let mut state = File::from(next()?);
        let file = given.has_file.then(&mut next).transpose()?;
        let lock = given.has_data.then(&mut next).transpose()?;
        let metrics = given.has_metrics.then(&mut next).transpose()?;
        let mut records = Vec::new();
        state.rewind()?;
        state.read_to_end(&mut records)?;
        let listeners = passed.collect();
        Ok(Self { passage, given, arena, records, file, lock, metrics, listeners })
    }

    /// What the running server lends.
    #[must_use]
    pub const fn memory(&self) -> ByteCount {
        self.given.memory
    }

    /// Says that this process can go on; returns once it is to.
    pub(crate) fn ready(&self) -> Result<(), HandOverError> {
        send(&self.passage, &Packet::Ready, &[])?;
        match receive(&self.passage, None)? {
            (Packet::Yours, _) => Ok(()),
            _ => Err(HandOverError::NotUnderstood),
        }
    }

    /// Says that this process serves from now on.
    pub(crate) fn taken(&self) {
        // A predecessor that is gone meanwhile does not go on either.
        let _ = send(&self.passage, &Packet::Taken, &[]);
    }

    /// Says why this process does not go on.
    pub(crate) fn refuse(&self, error: &dyn std::error::Error) {
        refuse(&self.passage, error);
    }
}

/// Waits until a successor has started, and looks whether both mean the same.
pub(crate) fn greet(passage: &Passage) -> Result<(), HandOverError> {
    let deadline = Instant::now() + HELLO_PATIENCE;
    match receive(passage, Some(deadline))? {
        (Packet::Hello { version: VERSION, records: RECORDS_VERSION }, _) => Ok(()),
        (Packet::Hello { version, records }, _) => {
            let error = HandOverError::Version { theirs: format!("{version}.{records}") };
            refuse(passage, &error);
            Err(error)
        }
        _ => Err(HandOverError::NotUnderstood),
    }
}

/// Hands over what a process serves that has stopped serving. If this fails it is to serve again.
pub(crate) fn give(
    passage: &Passage,
    given: &Given,
    parts: Parts<'_>,
) -> Result<(), HandOverError> {
    let state = rustix::fs::memfd_create("farmem-state", MemfdFlags::CLOEXEC);
    let mut state = File::from(state.map_err(io::Error::from)?);
    state.write_all(&parts.records)?;
    drop(parts.records);
    let mut passed = vec![parts.arena, state.as_fd()];
    passed.extend(parts.file.into_iter().chain(parts.lock).chain(parts.metrics));
    passed.extend(parts.listeners);
    send(passage, &Packet::Given(*given), &passed)?;
    drop(state);
    match receive(passage, Some(Instant::now() + READY_PATIENCE)) {
        Ok((Packet::Ready, _)) => {}
        Ok(_) => {
            refuse(passage, &HandOverError::NotUnderstood);
            return Err(HandOverError::NotUnderstood);
        }
        Err(error) => {
            refuse(passage, &error);
            return Err(error);
        }
    }
    send(passage, &Packet::Yours, &[])?;
    // It may be about to serve: only its word or its end says that it does not.
    match receive(passage, None)? {
        (Packet::Taken, _) => Ok(()),
        _ => Err(HandOverError::NotUnderstood),
    }
}

/// Tells the other process that nothing comes of it.
pub(crate) fn refuse(passage: &Passage, error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    // It may be gone.
    let _ = send(passage, &Packet::Refused(text), &[]);
}

/// Whether so many addresses can be handed over.
pub(crate) const fn fits(listeners: usize) -> bool {
    listeners <= LISTENERS_MAX
}

fn send(
    passage: &Passage,
    packet: &Packet,
    passed: &[BorrowedFd<'_>],
) -> Result<(), HandOverError> {
    passage.send(&packet.encode(), passed).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => HandOverError::Gone,
        _ => error.into(),
    })
}

fn receive(
    passage: &Passage,
    deadline: Option<Instant>,
) -> Result<(Packet, Vec<OwnedFd>), HandOverError> {
    match passage.receive(deadline)? {
        Arrival::Packet(bytes, passed) => match Packet::decode(&bytes) {
            Some(Packet::Refused(text)) => Err(HandOverError::Refused(text)),
            Some(packet) => Ok((packet, passed)),
            None => Err(HandOverError::NotUnderstood),
        },
        Arrival::Closed => Err(HandOverError::Gone),
        Arrival::Late => Err(HandOverError::Late),
    }
}

impl Packet {
    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let kind: u32 = match self {
            Self::Hello { .. } => 1,
            Self::Given(_) => 2,
            Self::Ready => 3,
            Self::Yours => 4,
            Self::Taken => 5,
            Self::Refused(_) => 6,
        };
        out.extend_from_slice(&kind.to_le_bytes());
        match self {
            Self::Hello { version, records } => {
                out.extend_from_slice(&version.to_le_bytes());
                out.extend_from_slice(&records.to_le_bytes());
            }
            Self::Given(given) => out.extend_from_slice(&given.encode()),
            Self::Ready | Self::Yours | Self::Taken => {}
            Self::Refused(text) => {
                let room = PACKET_BYTES_MAX - HEAD_BYTES;
                out.extend(text.bytes().take(room));
            }
        }
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
        if head[..8] != MAGIC {
            return None;
        }
        let u32_at = |at: usize| {
            let bytes = rest.get(at..at + 4)?;
            Some(u32::from_le_bytes(std::array::from_fn(|n| bytes[n])))
        };
        Some(match u32::from_le_bytes(std::array::from_fn(|n| head[8 + n])) {
            // A later version may say more.
            1 => Self::Hello { version: u32_at(0)?, records: u32_at(4)? },
            2 => Self::Given(Given::decode(rest)?),
            3 => Self::Ready,
            4 => Self::Yours,
            5 => Self::Taken,
            6 => Self::Refused(String::from_utf8_lossy(rest).into_owned()),
            _ => return None,
        })
    }
}

impl Given {
    fn encode(&self) -> [u8; GIVEN_BYTES] {
        let flags = u32::from(self.has_file)
            | u32::from(self.has_data) << 1
            | u32::from(self.has_metrics) << 2;
        let mut bytes = [0; GIVEN_BYTES];
        bytes[..4].copy_from_slice(&self.slots.to_le_bytes());
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.incarnation.get().to_le_bytes());
        bytes[16..24].copy_from_slice(&self.next_session.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.memory.get().to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; GIVEN_BYTES] = bytes.try_into().ok()?;
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let flags = u32_at(4);
        Some(Self {
            slots: u32_at(0),
            has_file: flags & 1 != 0,
            has_data: flags & 2 != 0,
            has_metrics: flags & 4 != 0,
            incarnation: Incarnation::new(u64_at(8)),
            next_session: u64_at(16),
            memory: ByteCount::new(u64_at(24)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_round_trip_and_cut_ones_are_none() {
        let given = Given {
            slots: 7,
            has_file: true,
            has_data: false,
            has_metrics: true,
            incarnation: Incarnation::new(u64::MAX - 1),
            next_session: 9,
            memory: ByteCount::new(1 << 40),
        };
        let packets = [
            Packet::Hello { version: 3, records: 4 },
            Packet::Given(given),
            Packet::Ready,
            Packet::Yours,
            Packet::Taken,
            Packet::Refused("no".to_owned()),
        ];
        for packet in packets {
            let bytes = packet.encode();
            assert_eq!(Packet::decode(&bytes).as_ref(), Some(&packet));
            assert_eq!(Packet::decode(&bytes[..HEAD_BYTES - 1]), None);
            if matches!(packet, Packet::Hello { .. } | Packet::Given(_)) {
                assert_eq!(Packet::decode(&bytes[..bytes.len() - 1]), None);
            }
        }
        assert!(Packet::Refused("x".repeat(9000)).encode().len() <= PACKET_BYTES_MAX);
    }
}

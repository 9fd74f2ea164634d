//! MSMP, the memory sharing messaging protocol: every byte that crosses between a client and a
//! memory server is declared here, and nowhere else. `docs/wire-format.md` draws it.
//!
//! ```text
//! +------------------+----------------------+---------------------------+
//! | header, 80 bytes | entries, 32 B a page | payload: pages, or a body |
//! +------------------+----------------------+---------------------------+
//! ```
//!
//! A message is decoded in that order, and each part is checked before the next one is believed:
//! the header by its own CRC (so that a flipped length is never used), entries and body by a
//! second one, pages by the checksum that the writing client made of them.
//!
//! This crate is pure: no sockets, no clock, no allocation except for text.

#![forbid(unsafe_code)]

mod body;
mod checksum;
mod entry;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod header;
mod map;
mod named;
mod refusal;
mod stat;

pub use body::{
    Attach, AttachMode, BodyError, FullBody, GrantedSetup, HELLO_BYTES, Hello, HelloReply, Malloc,
    MallocReply, NAME_BYTES_MAX, SETUP_BYTES_MAX, SLOTS_ASSIGNED_MAX, Setup, Slots,
};
pub use checksum::{Binding, crc32c, page_checksum, part_checksum};
pub use entry::{NO_SLOT, PAGE_ENTRY_BYTES, PageEntry, PartEntry, RangeEntry};
pub use header::{
    Action, DecodeError, HEADER_BYTES, Header, MAGIC, Payload, ProtocolVersion, seal, verify_body,
};
pub use map::{Absent, AskMap, MAP_LEASE, MapChange, MapReply, NEWS_MAX};
pub use named::{
    ADDRESS_BYTES_MAX, BackupPlace, Copy, Create, Delete, FileRange, Free, List, Open, PAGE_SIZES,
    PATH_BYTES_MAX, Prefer, Progress, RegionInfo, Resize, Source, TakenBody, Tier,
};
pub use refusal::{Advice, RefusalCode};
pub use stat::{CountOf, STAT_COUNTS_MAX, ServerStat, StatCount};

use farmem_region::PAGE_SIZE;

/// Pages that one message may carry: 1 MiB. More gains no throughput (64 pages already cost less
/// in system calls than in copying), and would make one client's message delay the others longer.
pub const PAGES_PER_MESSAGE_MAX: usize = 256;

/// Ranges that one free may carry.
pub const RANGES_PER_MESSAGE_MAX: usize = PAGES_PER_MESSAGE_MAX;

/// Bytes of header and entries in the largest message.
pub const HEAD_BYTES_MAX: usize = HEADER_BYTES + PAGES_PER_MESSAGE_MAX * PAGE_ENTRY_BYTES;

/// Bytes of the largest payload: as many pages as a message may carry.
pub const PAYLOAD_BYTES_MAX: usize = PAGES_PER_MESSAGE_MAX * PAGE_SIZE;

/// Bytes of the largest payload that is not pages: a body. Bounds what a receiver must buffer.
pub const BODY_BYTES_MAX: usize = 1024;

/// Parts of pages that one message may carry: all of a page of 4 KiB, in the smallest pages.
pub const PARTS_PER_MESSAGE_MAX: usize = 8;

/// Bytes of all parts that one message may carry. It fits where a receiver has room for a head of
/// pages and a body.
pub const PARTS_BYTES_MAX: usize = PAGE_SIZE;

const _: () = assert!(
    PARTS_PER_MESSAGE_MAX * PAGE_ENTRY_BYTES + PARTS_BYTES_MAX + HEADER_BYTES
        <= HEAD_BYTES_MAX + BODY_BYTES_MAX
);

/// The name of a variant as one word in lower case.
fn snake_case(name: &str) -> String {
    let mut word = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !word.is_empty() {
            word.push('_');
        }
        word.push(letter.to_ascii_lowercase());
    }
    word
}

//! The pager: moves pages between a program's memory and a store.
//!
//! [`Engine`] owns the state and decides. It knows no network (the store is a
//! [`farmem_region::PageStore`]) and no clock, and reaches memory only through [`Memory`].
//! [`Pager`] is the driver: it reads events and completions, hands them to the engine in order,
//! and says what to wait for.
//!
//! The life of a page, file by file: [`adopt`](Engine::adopt) finds the program's mappings,
//! `evict.rs` moves cold pages into frames, `looks.rs` sends what the servers do not have, `engine.rs`
//! answers a fault, `streams.rs` guesses what comes next, `install.rs` puts fetched pages in
//! place, `events.rs` follows what the program does to its mappings, `forks.rs` what its children
//! begin with, and `handover.rs` hands them over to pagers of their own.

#![forbid(unsafe_code)]

mod adopt;
mod budget;
mod changes;
mod counts;
mod driver;
mod engine;
mod events;
mod evict;
mod forks;
mod frames;
mod handover;
mod install;
mod library;
mod look_out;
mod looks;
mod memory;
mod ranges;
mod relief;
mod sharing;
mod slots;
mod streams;
mod table;
mod threads;

pub use counts::{Counts, Latency, Sample};
pub use driver::{Pager, Ready, Wait};
pub use engine::{Config, Engine, Fatal, Io, Scope};
pub use handover::HandOver;
pub use library::{Flush, Flushed};
pub use look_out::LookOut;
pub use memory::{Memory, MemoryError, OwnMemory, Registration, SpaceId};
pub use slots::SlotPolicy;

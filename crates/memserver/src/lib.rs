//! The memory server: lends memory to clients over connections.
//!
//! ```text
//! Listener -> Worker (threads, epoll) -> Peer (one connection: bytes to requests and back)
//!                                          |
//!                                        Engine (sessions, regions) -> Table (pages to places)
//!                                          |
//!                                        Tiers (dram, compressed, file) -> Arena (farmem-vmem)
//! ```
//!
//! A write is received into fresh slots, its checksums recomputed from the stored bytes, and only
//! then do the table's entries flip and the old slots go free: a bad message, or a client that
//! dies in the middle, never harms what was acknowledged. A read is sent straight from its slots;
//! a token for each keeps it from changing meanwhile.

#![forbid(unsafe_code)]

mod backing;
mod backup;
mod config;
mod counters;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handover;
mod headroom;
mod http;
mod journal;
mod large;
mod leaf;
mod leases;
mod log;
mod metrics;
mod neighbour;
mod news;
mod output;
mod page_set;
mod patience;
mod peer;
mod prefer;
mod region;
mod seat;
mod server;
mod session;
mod table;
mod tiers;
mod worker;
mod working_set;

pub use config::{FileTierConfig, Limits, ServerConfig, TierConfig};
pub use handover::{HandOverError, Handed};
pub use headroom::MemoryLeft;
pub use journal::DataError;
pub use log::{LogLevel, LogLine, LogSink, LogValue};
pub use neighbour::{DistantRegion, Neighbours, Use};
pub use server::{Ended, MemServer, ServerError, StopHandle};

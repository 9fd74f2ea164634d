//! The page store over the network: [`RemoteStore`] keeps the pages of one region on one memory
//! server.
//!
//! ```text
//! submit -> Operation -> Messages (at most 256 pages each) -> Link: sent in order, pipelined
//! done   <- Operation <- replies, in any order             <- Link: received into frames
//! ```
//!
//! A page that arrives is checked against what was asked for: page, version, and the checksum
//! that binds both to the content. A store is complete only when the server has acknowledged it.
//! A connection that breaks is made anew within a bounded time and unanswered requests are sent
//! again, which is harmless: writes are compared by version. If the server is gone, has restarted
//! or has ended the session, the store fails closed.
//!
//! This also runs in the pager, inside foreign address spaces: no thread, no global state, and no
//! allocation for a fetch once its buffers have grown.

#![forbid(unsafe_code)]

pub mod admin;
mod config;
mod exchange;
mod kept;
mod link;
mod map;
mod messages;
pub mod named;
mod reconnect;
mod shared;
mod store;

pub use config::{RemoteConfig, SessionInfo, SessionKey, Timeouts};
pub use farmem_wire::Absent;
pub use map::RegionMap;
pub use store::RemoteStore;

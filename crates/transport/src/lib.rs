//! Moves bytes between a client and a memory server: TCP and Unix sockets behind the one trait
//! [`Connection`], and the memory of a server on the same machine. Knows no messages; what the bytes mean is `farmem-wire`'s business.
//!
//! Only this crate opens sockets. Its client side also runs in the pager, inside foreign address
//! spaces: no thread, no global state, no signal (`MSG_NOSIGNAL`), system calls made directly.

#![forbid(unsafe_code)]

mod address;
mod arena;
mod listener;
mod passage;
mod slices;
mod socket;

pub use address::{AddressError, Endpoint, ServerAddress};
pub use arena::ArenaFile;
pub use listener::Listener;
pub use passage::{Arrival, PACKET_BYTES_MAX, PASSED_MAX, Passage};
pub use slices::{SLICES_MAX, read_at, recycle, recycle_mut, skip_bytes, skip_bytes_mut, write_at};
pub use socket::{Connection, Moved, Socket};

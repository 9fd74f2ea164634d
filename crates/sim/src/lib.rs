//! The real engines on simulated surroundings, from one seed.
//!
//! A random program with several threads loads, stores, drops, moves, unmaps and forks; its memory
//! ([`memory`](SimMemory)) and its page store ([`store`](SimStore)) are simulated, with the
//! kernel's rules and with delays and reordering; the pager's engine between them is the real one.
//! Every load is compared with a plain model: R1, never a wrong byte. Every thread that waits must
//! go on within bounded virtual time.
//!
//! The same seed does the same thing, so a failure is a command that replays it. Planted defects
//! ([`Plant`]) show that the checks find what they are for.

#![forbid(unsafe_code)]

mod handing;
mod memory;
mod porter;
mod program;
mod random;
mod run;
mod space;
mod store;

pub use memory::SimMemory;
pub use random::Random;
pub use run::{Failure, Outcome, Plant, Setup, run};
pub use store::SimStore;

//! What a memory server has no room for goes to a file.
//!
//! ```text
//!   slots of the region   0 ............ boundary ............ end
//!                         memory server        | spill file
//! ```
//!
//! The boundary is the size that the region had on the server when the server refused to let it
//! grow. A request may touch both sides; it is complete when both parts are.

mod file;
mod store;
#[cfg(test)]
mod tests;

pub use file::SpillFile;
pub use store::{ProgramStore, SpillStore};

//! What the programs of this crate share. None of them knows that farmem exists: they use memory
//! as any program does, check every byte that they read, and say what it cost.
//!
//! Exit status of every program: 0 all right, 3 a wrong byte was read, anything else a failure
//! of the program itself.

pub mod content;
pub mod report;

pub use content::{Content, Mismatch};
pub use report::{Cost, Stopwatch};

/// Bytes of one page, the unit in which memory comes and goes.
pub const PAGE_BYTES: usize = 4096;

/// Words of eight bytes in one page.
pub const PAGE_WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// Exit status of a program that read a byte that nobody wrote there.
pub const EXIT_WRONG_BYTE: u8 = 3;

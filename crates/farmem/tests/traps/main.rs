//! What breaks paged memory, tried on the whole of farmem: the three files that ship, on the real
//! kernel, under programs that do one dangerous thing each, with a quarter of the memory they use.
//!
//! The rules that a test stands for:
//! R1, a load returns the last byte stored there, or waits, or the program is stopped;
//! R6, nobody waits without bounds and without a reported reason.
//! A number in a name (`u3`) is that of a way in which Linux memory management is known to break
//! paging; the line above each test says which.

mod cores;
mod deaths;
mod groups;
mod kernel;
mod oracles;
mod programs;
mod rig;
mod servers;
mod trees;
mod unpaged;

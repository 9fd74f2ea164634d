//! Regions on a memory server in this process.

mod mapped;
mod server;
mod unmapped;

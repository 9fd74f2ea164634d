//! Regions on a memory server in this process.

mod mapped;
mod named;
mod server;
mod unmapped;

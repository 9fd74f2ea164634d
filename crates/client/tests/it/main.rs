//! Regions on a memory server in this process.

mod forked;
mod mapped;
mod named;
mod server;
mod unmapped;

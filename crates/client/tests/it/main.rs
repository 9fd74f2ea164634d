//! Regions on a memory server in this process.

mod forked;
mod given_back;
mod mapped;
mod named;
mod server;
mod unmapped;

//! The store against real servers, hostile servers and broken networks.

mod basics;
mod client;
mod frames;
mod server;

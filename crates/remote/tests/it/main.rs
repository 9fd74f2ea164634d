//! The store against real servers, hostile servers and broken networks.

mod basics;
mod client;
mod concurrency;
mod frames;
mod hostile;
mod loss;
mod named;
mod proxy;
mod server;
mod shared;

//! What the server's tables take: its private memory, as pages lie in shared memory.

use serde::Serialize;

use super::serving::{GIB, PAGE_BYTES, Place, Server};
use crate::build::Built;

/// Of the region that is never written.
const EMPTY: u64 = 1024 * GIB;
/// Of the one that is written as a whole.
const FULL: u64 = 4 * GIB;

#[derive(Debug, Serialize)]
pub(crate) struct Tables {
    /// Bytes for a region of 1 TiB before it is used, and a copy of it.
    pub(crate) empty_bytes: u64,
    /// Bytes for each page of a region that is written as a whole.
    pub(crate) bytes_per_page: f64,
}

impl Tables {
    pub(crate) fn measure(built: &Built, quick: bool) -> anyhow::Result<Self> {
        let place = Place::new("/dev/shm")?;
        let full = if quick { GIB } else { FULL };
        let promise = ["--promise-ratio", "4096"];
        let server = Server::start(built, &place, full + GIB / 4, &promise)?;
        // What the server takes for whoever asks it something, whatever that is.
        server.fill("some", 1 << 20)?;
        let before = server.status_bytes("RssAnon")?;
        server.ask(&["region", "create", "empty", "--size", &EMPTY.to_string()])?;
        server.ask(&["region", "clone", "empty", "copy"])?;
        let empty = server.status_bytes("RssAnon")?;
        server.fill("full", full)?;
        let filled = server.status_bytes("RssAnon")?;
        Ok(Self {
            empty_bytes: empty.saturating_sub(before),
            bytes_per_page: filled.saturating_sub(empty) as f64 / (full / PAGE_BYTES as u64) as f64,
        })
    }
}

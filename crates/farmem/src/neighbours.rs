//! How a memory server that this binary starts reaches others, of whose regions its own are made.

use std::io;
use std::ops::Range;
use std::time::Duration;

use farmem_memserver::{DistantRegion, Neighbours, Use};
use farmem_region::{Incarnation, PageIndex, PageRange, RegionId, StoreError};
use farmem_remote::named::{NamedRegion, RangeAction};
use farmem_transport::ServerAddress;
use farmem_wire::RegionInfo;

/// A read that a client waits for is refused after this time: the client takes a server that says
/// nothing for a second for lost.
const READ_TIMEOUT: Duration = Duration::from_millis(700);
/// Who flushes waits for a disk there.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// Over connections of their own.
pub(crate) fn neighbours() -> Neighbours {
    Neighbours::new(|address, region, for_what| {
        let address: ServerAddress = address.parse().map_err(io::Error::other)?;
        let endpoint = address.resolve()?;
        let (takes_over, timeout) = match for_what {
            Use::Read => (false, READ_TIMEOUT),
            Use::Write => (true, WRITE_TIMEOUT),
        };
        let region = NamedRegion::open(&endpoint, region, takes_over, timeout).map_err(failed)?;
        Ok(Box::new(Neighbour(region)))
    })
}

struct Neighbour(NamedRegion);

impl DistantRegion for Neighbour {
    fn identity(&self) -> (Incarnation, RegionId) {
        self.0.identity()
    }

    fn size(&mut self) -> io::Result<u64> {
        // Asked anew, as it may have been made larger.
        let RegionInfo { pages, .. } = self.0.show().map_err(failed)?;
        Ok(pages.bytes().get())
    }

    fn read(&mut self, bytes: Range<u64>) -> io::Result<Vec<u8>> {
        self.0.read(bytes).map_err(failed)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(at, bytes).map_err(failed)
    }

    fn flush(&mut self) -> io::Result<()> {
        let info = self.0.show().map_err(failed)?;
        if info.writes_back {
            let all = PageRange { start: PageIndex::new(0), count: info.pages };
            self.0.over(RangeAction::Flush, all).map_err(failed)?;
        }
        // Otherwise that server has them, and keeps them as it keeps everything.
        Ok(())
    }
}

fn failed(error: StoreError) -> io::Error {
    io::Error::other(error)
}

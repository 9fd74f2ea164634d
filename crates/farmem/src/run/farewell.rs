//! Ends sessions that their pagers could not end, so that a server has its memory back at once and
//! not after the session's time-out.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context;
use farmem_region::{ByteCount, Epoch, Incarnation, RegionId, SessionId};
use farmem_remote::{SessionInfo, admin};
use farmem_supervise::SessionReport;
use farmem_transport::ServerAddress;

use crate::standard_error;

/// With [`crate::run::pagers::FAREWELL`] it makes less than a second.
const TIMEOUT: Duration = Duration::from_millis(400);

/// The disconnects that are under way. Each has a thread: it waits for a server, and the
/// supervisor must not.
#[derive(Debug, Default)]
pub(crate) struct Farewells(Vec<JoinHandle<()>>);

impl Farewells {
    /// Ends a session, or tells people why the server keeps its memory a while longer; unless they
    /// have been `told` already that something is wrong, most likely with that server.
    pub(crate) fn add(&mut self, report: SessionReport, told: bool) {
        self.0.push(thread::spawn(move || {
            if let Err(error) = disconnect(&report)
                && !told
            {
                let SessionReport { session, server, .. } = report;
                standard_error::tell(format_args!(
                    "cannot end session {session} on {server}, which frees its memory by itself \
                     soon: {error:#}"
                ));
            }
        }));
    }

    /// Returns when all have ended, one way or the other.
    pub(crate) fn wait(self) {
        for farewell in self.0 {
            // A panic has been told by its thread.
            let _ = farewell.join();
        }
    }
}

fn disconnect(report: &SessionReport) -> anyhow::Result<()> {
    let address: ServerAddress = report.server.parse()?;
    let server = address.resolve().context("cannot resolve the address")?;
    let granted = ByteCount::new(report.granted);
    let session = SessionInfo {
        server: server.clone(),
        session: SessionId::new(report.session),
        token: report.token,
        epoch: Epoch::new(report.epoch),
        incarnation: Incarnation::new(report.incarnation),
        region: RegionId::new(report.region),
        granted,
        pages: granted.pages_rounded_up(),
    };
    Ok(admin::disconnect_session(&server, &session, TIMEOUT)?)
}

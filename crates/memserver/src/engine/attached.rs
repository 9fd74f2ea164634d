//! Clients of one named region that come, take over and go: whoever may believe what he knows of it goes
//! on to be waited for. Leases last for an hour here, so that none of them ends meanwhile.

use std::time::{Duration, Instant};

use farmem_region::{ByteCount, Nanos, PAGE_SIZE, PageIndex, Version};
use farmem_wire::{Create, Header, Open, PageEntry, RefusalCode, Source, page_checksum};

use super::{Caller, Engine, Refusal, SharedSession, lock};
use crate::config::ServerConfig;
use crate::leases::Leases;

const NAME: &str = "region";
const HOUR: Duration = Duration::from_secs(3600);

fn config() -> ServerConfig {
    ServerConfig::new(Vec::new(), ByteCount::new(4 << 20))
}

/// An engine with a region.
fn engine(config: ServerConfig) -> Engine {
    let engine = Engine::new(config).unwrap();
    let (size, source) = (ByteCount::new(1 << 20), Source::Fill(7));
    let create = Create { name: NAME, size, page_bytes: 4096, source, prefers: None };
    engine.create(&create).unwrap();
    engine
}

/// A client of it.
fn open(engine: &Engine, take_over: bool) -> Result<(Caller, Header), Refusal> {
    let mut caller = engine.caller();
    let (header, _) = engine.open(&mut caller, &Open { take_over, name: NAME })?;
    Ok((caller, Header { entries: 1, ..header }))
}

fn session(caller: &Caller) -> SharedSession {
    caller.session.as_ref().unwrap().1.clone()
}

/// A client believes for an hour what it knows.
fn lease(caller: &Caller) {
    let shared = session(caller);
    assert!(lock(&shared).leases.grant(caller.connection, Instant::now() + HOUR));
}

fn write(
    engine: &Engine,
    (caller, header): &(Caller, Header),
    version: u64,
) -> Result<(), RefusalCode> {
    let (page, version) = (PageIndex::new(0), Version::new(version));
    let checksum = page_checksum(header.region, page, version, &[9; PAGE_SIZE]);
    let entries = [PageEntry { page, version, checksum, slot: 0 }];
    let (mut slots, mut unused) = (Vec::new(), Vec::new());
    let written =
        engine.begin_write(caller, header, entries.into_iter(), &mut slots).and_then(|()| {
            engine.arena.bytes_mut(&mut slots[0]).fill(9);
            engine.commit_write(caller, header, &entries, &mut slots, &mut unused, |_| ())
        });
    written.map_err(|refusal| refusal.code)
}

/// Whether the region may be changed once all leases have ended.
fn is_free_later((caller, _): &(Caller, Header)) -> bool {
    let later = Instant::now() + HOUR + HOUR;
    lock(&session(caller)).leases.check_change(caller.connection, later).is_ok()
}

#[test]
fn cap_93_a_reader_is_waited_for_when_the_writer_has_gone() {
    let engine = engine(config());
    let (reader, _) = open(&engine, false).unwrap();
    let mut writer = open(&engine, true).unwrap();
    lease(&reader);
    engine.leave(&mut writer.0, Nanos::new(1));
    // With the reader attached alone, then with nobody.
    engine.disconnect(&writer.1).unwrap();
    let next = open(&engine, true).unwrap();
    assert_eq!(write(&engine, &next, 1), Err(RefusalCode::Busy));
    let mut reader = reader;
    engine.leave(&mut reader, Nanos::new(1));
    let (mut gone, header) = next;
    engine.leave(&mut gone, Nanos::new(1));
    engine.disconnect(&header).unwrap();
    let next = open(&engine, true).unwrap();
    assert_eq!(write(&engine, &next, 1), Err(RefusalCode::Busy));
    assert!(is_free_later(&next));
}

#[test]
fn cap_93_a_writer_that_disconnects_is_not_waited_for() {
    let engine = engine(config());
    let writer = open(&engine, true).unwrap();
    lease(&writer.0);
    engine.disconnect(&writer.1).unwrap();
    let next = open(&engine, true).unwrap();
    assert_eq!(write(&engine, &next, 1), Ok(()));
}

#[test]
fn cap_93_whoever_knew_a_former_process_is_waited_for_after_a_disconnect() {
    let place = tempfile::tempdir().unwrap();
    let mut config = config();
    config.data = Some(place.path().canonicalize().unwrap().join("data"));
    drop(engine(config.clone()));
    let engine = Engine::new(config).unwrap();
    let writer = open(&engine, true).unwrap();
    // As that of a process that has only just gone.
    lock(&session(&writer.0)).leases = Leases::after_restart(Instant::now() + HOUR);
    engine.disconnect(&writer.1).unwrap();
    let next = open(&engine, true).unwrap();
    assert_eq!(write(&engine, &next, 1), Err(RefusalCode::Busy));
    assert!(is_free_later(&next));
}

#[test]
fn a_take_over_that_is_refused_changes_nothing() {
    let mut config = config();
    config.limits.connections_per_session_max = 2;
    let engine = engine(config);
    let writer = open(&engine, true).unwrap();
    let (mut reader, _) = open(&engine, false).unwrap();
    for take_over in [true, false] {
        assert_eq!(open(&engine, take_over).unwrap_err().code, RefusalCode::Busy);
    }
    assert_eq!(write(&engine, &writer, 1), Ok(()));
    engine.leave(&mut reader, Nanos::new(1));
    open(&engine, true).unwrap();
    assert_eq!(write(&engine, &writer, 2), Err(RefusalCode::StaleEpoch));
}

/// As readers do that are told that somebody has taken over: by another connection, before the former one ends.
#[test]
fn at_the_limit_all_readers_come_back_after_a_take_over() {
    let mut config = config();
    config.limits.connections_per_session_max = 3;
    let engine = engine(config);
    let readers = [(); 2].map(|()| open(&engine, false).unwrap());
    let writer = open(&engine, true).unwrap();
    let again = [(); 2].map(|()| open(&engine, false).unwrap());
    assert_eq!(open(&engine, false).unwrap_err().code, RefusalCode::Busy);
    assert_eq!(write(&engine, &writer, 1), Ok(()));
    drop((readers, again));
}

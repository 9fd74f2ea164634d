//! Clients of one named region that come, take over and go: whoever may believe what he knows of it goes
//! on to be waited for. Leases last for an hour here, so that none of them ends meanwhile.

use std::time::{Duration, Instant};
use std::{fs, thread};

use farmem_region::{ByteCount, Nanos, PAGE_SIZE, PageIndex, Version};
use farmem_wire::{
    Action, Create, Delete, Header, Open, PageEntry, RefusalCode, Source, page_checksum,
};

use super::{Caller, Cause, Engine, Refusal, SharedSession, lock};
use crate::config::ServerConfig;
use crate::leases::Leases;

const NAME: &str = "region";
const HOUR: Duration = Duration::from_secs(3600);

fn config() -> ServerConfig {
    ServerConfig::new(Vec::new(), ByteCount::new(4 << 20))
}

/// An engine with a region.
fn engine(config: ServerConfig) -> Engine {
    engine_of(config, Source::Fill(7))
}

fn engine_of(config: ServerConfig, source: Source<'_>) -> Engine {
    let engine = Engine::new(config).unwrap();
    let size = ByteCount::new(1 << 20);
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

/// Also one that was given a lease since it was looked whether anybody has one.
#[test]
fn cap_93_a_region_that_somebody_else_believes_to_know_is_not_deleted() {
    let engine = engine(config());
    let (caller, header) = open(&engine, true).unwrap();
    let (reader, _) = open(&engine, false).unwrap();
    lease(&reader);
    assert!(!engine.end(&session(&caller), Cause::Deleted(caller.connection), |_| true));
    let delete = || engine.delete(&caller, &header, Delete { keeps_copies: false });
    assert_eq!(delete().unwrap_err().code, RefusalCode::Busy);
    lock(&session(&caller)).leases = Leases::default();
    lease(&caller);
    delete().unwrap();
}

/// What was restored is not thrown away because a reader asks again and again while a flush is waited for.
#[test]
fn cap_73_a_restore_in_place_waits_for_a_flush_and_then_for_an_active_reader() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().canonicalize().unwrap();
    let [path, backup] = ["file", "backup"].map(|name| directory.join(name));
    let [path, backup] = [&path, &backup].map(|path| path.to_str().unwrap());
    fs::write(path, vec![7; 1 << 20]).unwrap();
    let mut config = config();
    config.directories = vec![directory.clone()];
    let engine = engine_of(config, Source::File { path, offset: 0 });
    let mut writer = open(&engine, true).unwrap();
    writer.0.may_wait = true;
    write(&engine, &writer, 1).unwrap();
    let header = Header { action: Action::Backup, ..writer.1 };
    engine.back_up(&writer.0, &header, backup, true).unwrap();
    let (reader, _) = open(&engine, false).unwrap();
    let shared = session(&reader);
    let asks = || {
        let (now, mut session) = (Instant::now(), lock(&shared));
        session.leases.renew(reader.connection, now) || session.leases.grant(reader.connection, now)
    };
    let file = lock(&shared).region.written_file().unwrap().clone();
    let flush = file.take_turn().unwrap();
    thread::scope(|scope| {
        let restored = scope.spawn(|| engine.restore(backup, NAME, true).map(|_| ()));
        while engine.sessions().by_id.len() == 1 {
            asks();
        }
        // Until he is refused, and not any more, if ever.
        let (began, mut was_refused) = (Instant::now(), false);
        while began.elapsed() < Duration::from_millis(if was_refused { 2000 } else { 100 }) {
            let has_lease = asks();
            if was_refused && has_lease {
                break;
            }
            was_refused |= !has_lease;
        }
        drop(flush);
        while !restored.is_finished() {
            asks();
        }
        restored.join().unwrap().unwrap();
    });
    assert!(!asks(), "he would believe what was there before");
    let (_, header) = open(&engine, false).unwrap();
    assert_ne!(header.session, writer.1.session);
}

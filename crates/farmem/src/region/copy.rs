//! `farmem region copy`: from region to region, on one server or on two.

use anyhow::{Context, bail};
use farmem_region::{ByteCount, PAGE_SIZE};
use farmem_remote::named::{self, NamedRegion};
use farmem_transport::Endpoint;
use farmem_wire::{Create, NAME_BYTES_MAX, RegionInfo, Source};

use super::cli::{ByteRange, CopyOptions, ServerOption};
use super::interrupts::Interrupts;
use super::{STEP, TIMEOUT, endpoint};
use crate::say;

/// Copies a region, or a part of it. A region that is made for the copy has its name only once all
/// of it is there. Nothing else is left, also where it is interrupted.
pub(super) fn copy(options: &CopyOptions) -> anyhow::Result<()> {
    let interrupts = Interrupts::heed()?;
    let result = copy_at_an_instant(options, &interrupts);
    if let (Err(error), Err(_)) = (&result, interrupts.check()) {
        say(error);
        interrupts.let_through();
    }
    result
}

fn copy_at_an_instant(options: &CopyOptions, interrupts: &Interrupts) -> anyhow::Result<()> {
    let from_server = endpoint(&options.server)?;
    let to_server = match &options.to_server {
        Some(server) => endpoint(&ServerOption { server: server.clone() })?,
        None => from_server.clone(),
    };
    // One instant: a snapshot, for as long as it takes.
    let mut original = open(&from_server, &options.name, false)?;
    let info = original.show()?;
    let instant = own_name(&options.name, "copied");
    original.copy(&instant, true, false)?;
    let result = open(&from_server, &instant, false)
        .and_then(|mut snapshot| copy_to(options, &mut snapshot, &info, &to_server, interrupts));
    let deleted = open(&from_server, &instant, true).and_then(|made| Ok(made.delete(false)?));
    cleaned(result, deleted, &instant)
}

fn copy_to(
    options: &CopyOptions,
    snapshot: &mut NamedRegion,
    info: &RegionInfo,
    server: &Endpoint,
    interrupts: &Interrupts,
) -> anyhow::Result<()> {
    let all = ByteRange { offset: 0, length: snapshot.size().get() };
    let range = options.range.unwrap_or(all);
    let start = options.to_offset.map_or(range.offset, |offset| offset.0);
    let is_there = named::list(server, TIMEOUT)?.iter().any(|region| region.name == options.to);
    if is_there {
        let mut to = open(server, &options.to, true)?;
        return copy_bytes(snapshot, range, &mut to, start, false, interrupts);
    }
    let end = start.checked_add(range.length).context("it would end beyond 16 EiB")?;
    let unit = u64::from(info.page_bytes).max(PAGE_SIZE as u64);
    let size = end.max(if options.range.is_none() { all.length } else { 0 });
    let size = ByteCount::new(size.next_multiple_of(unit));
    let part = own_name(&options.to, "in the making");
    let (page_bytes, source, prefers) = (info.page_bytes, Source::Fill(0), None);
    let create = Create { name: &part, size, page_bytes, source, prefers };
    named::create(server, &create, TIMEOUT)?;
    let result = open(server, &part, true).and_then(|mut made| {
        copy_bytes(snapshot, range, &mut made, start, true, interrupts)?;
        interrupts.check()?;
        made.copy(&options.to, false, false)?;
        Ok(())
    });
    let deleted = open(server, &part, true).and_then(|made| Ok(made.delete(true)?));
    cleaned(result, deleted, &part)
}

/// The name of what is there for as long as a region is copied: that of the region, cut where it would be too
/// long, and whose it is.
fn own_name(region: &str, what: &str) -> String {
    let whose = format!(" ({what} by {})", std::process::id());
    let mut end = region.len().min(NAME_BYTES_MAX - whose.len());
    while !region.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{whose}", &region[..end])
}

/// What came of it, and that of a region that could not be deleted, if so.
fn cleaned(
    result: anyhow::Result<()>,
    deleted: anyhow::Result<()>,
    region: &str,
) -> anyhow::Result<()> {
    let Err(left) = deleted else { return result };
    let left = format!("region {region:?} is left behind, delete it ({left:#})");
    match result {
        Ok(()) => bail!("{left}"),
        Err(error) => Err(error.context(left)),
    }
}

fn copy_bytes(
    from: &mut NamedRegion,
    range: ByteRange,
    to: &mut NamedRegion,
    start: u64,
    is_new: bool,
    interrupts: &Interrupts,
) -> anyhow::Result<()> {
    if range.offset + range.length > from.size().get() {
        bail!("the range ends beyond the region");
    }
    if start.checked_add(range.length).is_none_or(|end| end > to.size().get()) {
        bail!("the range ends beyond the region that it is copied to");
    }
    let end = range.offset + range.length;
    for at in (range.offset..end).step_by(STEP) {
        interrupts.check()?;
        let bytes = from.read(at..end.min(at + STEP as u64))?;
        // A region that was made for the copy holds zeros, and a thin one is to stay thin.
        if is_new && bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let target = start + (at - range.offset);
        to.write(target, &bytes)?;
    }
    Ok(())
}

fn open(server: &Endpoint, name: &str, take_over: bool) -> anyhow::Result<NamedRegion> {
    NamedRegion::open(server, name, take_over, TIMEOUT).with_context(|| format!("region {name}"))
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn names_of_what_is_there_meanwhile_are_never_too_long() {
        let short = own_name("big", "copied");
        assert_eq!(short, format!("big (copied by {})", std::process::id()));
        for name in ["x".repeat(NAME_BYTES_MAX), "\u{e4}".repeat(NAME_BYTES_MAX / 2)] {
            let own = own_name(&name, "in the making");
            assert!(own.len() <= NAME_BYTES_MAX && own.len() > NAME_BYTES_MAX - 4, "{own}");
            assert!(own.ends_with(')'), "{own}");
        }
    }

    #[test]
    fn the_first_error_is_told_and_what_is_left_too() {
        assert!(cleaned(Ok(()), Ok(()), "r").is_ok());
        let first = || Err(anyhow!("the disk is full"));
        let second = || Err(anyhow!("the server has gone"));
        let error = cleaned(first(), Ok(()), "r").unwrap_err();
        assert_eq!(format!("{error:#}"), "the disk is full");
        let error = cleaned(first(), second(), "r").unwrap_err();
        assert_eq!(error.root_cause().to_string(), "the disk is full");
        let told = format!("{error:#}");
        assert!(told.contains("\"r\" is left") && told.contains("has gone"), "{told}");
        assert!(cleaned(Ok(()), second(), "r").is_err());
    }
}

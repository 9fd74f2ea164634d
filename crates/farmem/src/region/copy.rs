//! `farmem region copy`: from region to region, on one server or on two.

use anyhow::{Context, bail};
use farmem_region::{ByteCount, PAGE_SIZE};
use farmem_remote::named::{self, NamedRegion};
use farmem_transport::Endpoint;
use farmem_wire::{Create, RegionInfo, Source};

use super::cli::{ByteRange, CopyOptions, ServerOption};
use super::{STEP, TIMEOUT, endpoint};

/// Copies a region, or a part of it. A region that is made for the copy has its name only once all
/// of it is there.
pub(super) fn copy(options: &CopyOptions) -> anyhow::Result<()> {
    let from_server = endpoint(&options.server)?;
    let to_server = match &options.to_server {
        Some(server) => endpoint(&ServerOption { server: server.clone() })?,
        None => from_server.clone(),
    };
    // One instant: a snapshot, for as long as it takes.
    let mut original = open(&from_server, &options.name, false)?;
    let info = original.show()?;
    let instant = format!("{} (copied by {})", options.name, std::process::id());
    original.copy(&instant, true, false)?;
    let result = open(&from_server, &instant, false)
        .and_then(|mut snapshot| copy_to(options, &mut snapshot, &info, &to_server));
    open(&from_server, &instant, true)?.delete(false)?;
    result
}

fn copy_to(
    options: &CopyOptions,
    snapshot: &mut NamedRegion,
    info: &RegionInfo,
    server: &Endpoint,
) -> anyhow::Result<()> {
    let all = ByteRange { offset: 0, length: snapshot.size().get() };
    let range = options.range.unwrap_or(all);
    let start = options.to_offset.map_or(range.offset, |offset| offset.0);
    let is_there = named::list(server, TIMEOUT)?.iter().any(|region| region.name == options.to);
    if is_there {
        let mut to = open(server, &options.to, true)?;
        return copy_bytes(snapshot, range, &mut to, start, false);
    }
    let end = start.checked_add(range.length).context("it would end beyond 16 EiB")?;
    let unit = u64::from(info.page_bytes).max(PAGE_SIZE as u64);
    let size = end.max(if options.range.is_none() { all.length } else { 0 });
    let size = ByteCount::new(size.next_multiple_of(unit));
    let part = format!("{} (in the making by {})", options.to, std::process::id());
    let (page_bytes, source, prefers) = (info.page_bytes, Source::Fill(0), None);
    let create = Create { name: &part, size, page_bytes, source, prefers };
    named::create(server, &create, TIMEOUT)?;
    let mut made = open(server, &part, true)?;
    let result = copy_bytes(snapshot, range, &mut made, start, true)
        .and_then(|()| Ok(made.copy(&options.to, false, false).map(|_| ())?));
    open(server, &part, true)?.delete(true)?;
    result
}

fn copy_bytes(
    from: &mut NamedRegion,
    range: ByteRange,
    to: &mut NamedRegion,
    start: u64,
    is_new: bool,
) -> anyhow::Result<()> {
    if range.offset + range.length > from.size().get() {
        bail!("the range ends beyond the region");
    }
    if start.checked_add(range.length).is_none_or(|end| end > to.size().get()) {
        bail!("the range ends beyond the region that it is copied to");
    }
    let end = range.offset + range.length;
    for at in (range.offset..end).step_by(STEP) {
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

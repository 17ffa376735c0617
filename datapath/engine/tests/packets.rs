//! Every case of `testdata/packets`, on the host. `datapath/tests/testrun.rs` runs the same in the kernel.

#[path = "packets/both_ways.rs"]
mod both_ways;
#[path = "packets/case.rs"]
mod case;
#[path = "packets/frame.rs"]
mod frame;
#[path = "packets/guards.rs"]
mod guards;
#[path = "packets/world.rs"]
mod world;

use thyra_datapath_engine::host::End;

#[test]
fn every_packet_ends_as_its_case_says() {
    for (file, case) in case::all() {
        println!("{file}: {}", case.name);
        case.check(&case.run());
    }
}

#[test]
fn an_allowed_frame_that_is_cut_anywhere_is_dropped() {
    for (_, case) in case::all()
        .into_iter()
        .filter(|(_, case)| case.verdict == world::ALLOW)
    {
        let node = case.node();
        let whole = frame::frame(&case.packet).len();
        let headers = 14 + if case.packet.starts_with('[') { 40 } else { 20 };
        for cut in 1..=whole - headers {
            let packet = format!("{} short={cut}", case.packet);
            let end = case.end_on(&node, &frame::frame(&packet));
            assert_eq!(End::Drop, end, "{}: {cut} bytes cut off", case.name);
        }
    }
}

//! Filters of clsact qdiscs, where others have a say too. Tried on any kernel.

use thyra_datapath::abi::Mode;
use thyra_datapath::{Config, Datapath, Hook, Place};

use crate::node::{Fate, chain, config, on_a_node, output, run};
use crate::{FRIEND, PORT, SERVER, STRANGER, enforce, only_the_friend_gets_in, pods, tables};

fn open() -> Datapath {
    let config = Config {
        hook: Some(Hook::Clsact),
        place: Place::Host,
        ..config()
    };
    Datapath::open(config).unwrap_or_else(|e| panic!("{}", chain(&e)))
}

/// The filters at the server's interface, as `tc` tells them.
fn filters(direction: &str) -> String {
    output(&format!("tc filter show dev veth4 {direction}"))
}

#[test]
fn an_ingress_qdisc_in_the_place_is_refused_by_name_and_stays() {
    on_a_node(
        "clsact::an_ingress_qdisc_in_the_place_is_refused_by_name_and_stays",
        || {
            pods();
            run("tc qdisc add dev veth4 ingress");
            let mut datapath = open();
            let tables = tables(&mut datapath, Mode::Enforce, false);
            datapath.commit(&tables, 1).unwrap();
            let refused = chain(&datapath.attach(&SERVER.spec()).unwrap_err());
            assert!(refused.contains("qdisc of kind `ingress`"), "{refused}");
            assert!(output("tc qdisc show dev veth4").contains("ingress"));
            assert_eq!(filters("ingress"), "");
            run("tc qdisc del dev veth4 ingress");
            enforce(&mut datapath);
            only_the_friend_gets_in();
        },
    );
}

#[test]
fn a_foreign_filter_in_our_place_is_neither_replaced_nor_removed() {
    on_a_node(
        "clsact::a_foreign_filter_in_our_place_is_neither_replaced_nor_removed",
        || {
            pods();
            run("tc qdisc add dev veth4 clsact");
            run(
                "tc filter add dev veth4 egress pref 1 handle 0x5468 protocol all bpf da bytecode '1,6 0 0 4294967295'",
            );
            let before = filters("egress");
            let mut datapath = open();
            let tables = tables(&mut datapath, Mode::Enforce, false);
            datapath.commit(&tables, 1).unwrap();
            datapath.attach(&SERVER.spec()).unwrap_err();
            assert_eq!(filters("ingress"), "", "the other half is gone too");
            drop(datapath);
            Datapath::cleanup(&config().bpffs).unwrap();
            assert_eq!(filters("egress"), before);
        },
    );
}

#[test]
fn a_filter_of_an_older_layout_judges_on_when_the_next_build_fails_half_way() {
    on_a_node(
        "clsact::a_filter_of_an_older_layout_judges_on_when_the_next_build_fails_half_way",
        || {
            pods();
            enforce(&mut open());
            run("mv /run/bpf/thyra/* /run/bpf/thyra/0123456789abcdef");
            // Another's in the place of `to_pod`: the second half of the attachment is refused.
            run("tc filter del dev veth4 egress pref 1 handle 0x5468 bpf");
            run(
                "tc filter add dev veth4 egress pref 1 handle 0x5468 protocol all bpf da bytecode '1,6 0 0 4294967295'",
            );
            let mut datapath = open();
            let tables = tables(&mut datapath, Mode::Enforce, false);
            datapath.commit(&tables, 1).unwrap();
            datapath.attach(&SERVER.spec()).unwrap_err();
            assert!(filters("ingress").contains("from_pod"), "{}", filters("ingress"));
            run("tc filter del dev veth4 egress pref 1 handle 0x5468 bpf");
            datapath.attach(&SERVER.spec()).unwrap();
            assert_eq!(datapath.status().older_endpoints, 0);
            only_the_friend_gets_in();
        },
    );
}

#[test]
fn two_pins_of_one_filter_are_not_two_filters() {
    on_a_node("clsact::two_pins_of_one_filter_are_not_two_filters", || {
        pods();
        let mut datapath = open();
        let id = enforce(&mut datapath);
        // As if this process had died while it adopted another id's filters.
        let stale = datapath.reserve("uid-of-before").unwrap();
        assert_ne!(stale, id);
        run(&format!(
            "cd /run/bpf/thyra/*/ && index=$(ip -o link show veth4 | cut -d: -f1) && rm program-* && \
             mv filter-{id}-to-$index filter-{stale}-to-$index"
        ));
        drop(datapath);
        let mut datapath = open();
        datapath.attach(&SERVER.spec()).unwrap();
        datapath.detach(stale).unwrap();
        assert!(filters("egress").contains("to_pod"), "{}", filters("egress"));
        only_the_friend_gets_in();
    });
}

#[test]
fn cleaning_up_finds_a_filter_that_no_pin_names() {
    on_a_node("clsact::cleaning_up_finds_a_filter_that_no_pin_names", || {
        pods();
        enforce(&mut open());
        run("rm /run/bpf/thyra/*/filter-*");
        only_the_friend_gets_in();
        Datapath::cleanup(&config().bpffs).unwrap();
        assert_eq!(filters("egress") + &filters("ingress"), "");
        assert!(output("tc qdisc show dev veth4").contains("clsact"));
        assert_eq!(STRANGER.try_connect(SERVER.v4(), PORT), Fate::Answered);
        assert_eq!(FRIEND.try_connect(SERVER.v4(), PORT), Fate::Answered);
    });
}

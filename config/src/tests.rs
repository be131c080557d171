use std::time::Duration;

use model::BuildNetwork;

use crate::{Accelerator, Config, ConfigError, KeyRole};

fn problems(text: &str) -> Vec<String> {
    Config::parse(text).expect_err("this text has problems").iter().map(ToString::to_string).collect()
}

#[test]
fn the_empty_text_gives_the_documented_surfaces() {
    let config = Config::defaults();
    assert_eq!(config.edge.listen.to_string(), "127.0.0.1:8443");
    assert_eq!(config.api.listen.to_string(), "127.0.0.1:9000");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:9090");
    assert_eq!(config.node.data_dir.to_str(), Some("./data"));
    assert_eq!(config.edge.domain_suffix, "microvm.localhost");
}

#[test]
fn values_replace_defaults() {
    let config = Config::parse("[edge]\nlisten = \"[::1]:443\"\nhold_secs = 5\n[engine]\naccelerator = \"kvm\"\n[guest]\nagent = \"/a\"\n").unwrap();
    assert_eq!(config.edge.listen.port(), 443);
    assert_eq!(config.edge.limits.hold, Duration::from_secs(5));
    assert_eq!(config.engine.accelerator, Accelerator::Kvm);
    assert_eq!(config.guest.agent.as_deref(), Some("/a".as_ref()));
}

#[test]
fn what_may_be_unlimited_is_so_at_zero() {
    let limits = Config::parse("[edge]\nfirst_byte_deadline_secs = 30\nmax_body_bytes = 1_000\nmax_tokens_per_second = 0\n").unwrap().edge.limits;
    assert_eq!((limits.first_byte_deadline, limits.max_body_bytes, limits.max_tokens_per_second), (Some(Duration::from_secs(30)), Some(1_000), None));
    let limits = Config::defaults().edge.limits;
    assert_eq!((limits.first_byte_deadline, limits.max_body_bytes, limits.max_tokens_per_second), (None, None, Some(100_000)));
}

#[test]
fn builds_are_kept_from_the_host_unless_somebody_says_otherwise() {
    assert_eq!(Config::defaults().build.network, BuildNetwork::Internet);
    let network = |word: &str| Config::parse(&format!("[build]\nnetwork = \"{word}\"\n")).map(|config| config.build.network);
    assert_eq!((network("none"), network("host")), (Ok(BuildNetwork::Nothing), Ok(BuildNetwork::Host)));
    assert_eq!(problems("[build]\nnetwork = \"hots\"\n"), ["build.network: is \"hots\", but must be \"internet\" or \"none\" or \"host\""]);
}

#[test]
fn prices_are_numbers() {
    let prices = Config::parse("[prices]\nvcpu_second = 1\ngb_second = 2.5e-3\n").unwrap().prices;
    assert_eq!((prices.vcpu_second, prices.gb_second, prices.storage_gb_hour), (1.0, 0.0025, 0.000_111_111_1));
    let found = problems("[prices]\nvcpu_second = -1\ngb_second = nan\nsnapshot_read_gb = \"free\"\nstorage_gb_hour = inf\n");
    assert_eq!(found.len(), 4, "{found:?}");
    assert!(found.iter().all(|problem| problem.ends_with("must be a number from 0 to 1000000")), "{found:?}");
}

#[test]
fn lists_are_lists_of_what_they_say() {
    let guest = Config::parse("[guest]\negress_allow = [\"10.1.0.0/16\", \"192.168.7.5/32\"]\nname_servers = [\"10.1.0.2:53\"]\n").unwrap().guest;
    assert_eq!((guest.egress_allow.len(), guest.name_servers.len()), (2, 1));
    let guest = Config::defaults().guest;
    assert!(guest.egress_allow.is_empty() && guest.name_servers.is_empty());
    for bad in ["egress_allow = \"10.1.0.0/16\"", "egress_allow = [\"10.1.0.0/33\"]", "egress_allow = [1]", "name_servers = [\"10.1.0.2\"]"] {
        let found = problems(&format!("[guest]\n{bad}\n"));
        assert!(matches!(&found[..], [one] if one.starts_with("guest.") && one.contains("a list of")), "{bad}: {found:?}");
    }
}

#[test]
fn every_problem_is_reported_with_its_key() {
    let found = problems("[edge]\nlistne = \"127.0.0.1:1\"\nhold_secs = 0\ndomain_suffix = \"Not a name\"\n[lifecycel]\nx = 1\n[api]\nlisten = 9000\n[node]\naccount = \"12\"\n");
    let expected = [
        "node.account: is \"12\", but must be 12 digits",
        "edge.domain_suffix: is \"Not a name\", but must be a lower-case DNS name",
        "edge.hold_secs: is 0, but must be a whole number from 1 to 3600",
        "edge.listne: there is no such key; did you mean `listen`?",
        "api.listen: is 9000, but must be an address such as \"127.0.0.1:8443\"",
        "lifecycel: there is no such section; did you mean [lifecycle]?",
    ];
    assert_eq!(found, expected);
}

#[test]
fn what_is_no_section_is_named() {
    assert_eq!(problems("edge = 1")[0], "edge: is integer, but must be a section [edge]");
    assert_eq!(problems("colour = 1")[0], "colour: there is no such key at the top; every key belongs to a section");
    assert!(problems("[edge\n")[0].starts_with("this is not TOML: "));
}

#[test]
fn the_example_names_every_key_and_parses_when_uncommented() {
    let example = Config::example();
    let uncommented: String = example
        .lines()
        .filter(|line| !line.is_empty() && !line.ends_with("= "))
        .filter_map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.split_once(" = ").is_some_and(|(key, _)| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')) => Some(format!("{setting}\n")),
            Some(_) => None,
            None => Some(format!("{line}\n")),
        })
        .collect();
    assert_eq!(Config::parse(&uncommented), Ok(Config::defaults()), "{uncommented}");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Some("/nowhere/dormouse.toml".as_ref())).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
    assert_eq!(error.to_string(), "the configuration /nowhere/dormouse.toml cannot be read");
}

#[test]
fn access_keys_have_roles() {
    let keys = "[[api.keys]]\nid = \"A1\"\nrole = \"admin\"\n[[api.keys]]\nid = \"A2\"\nrole = \"operator\"\n[[api.keys]]\nid = \"A3\"\nrole = \"token-minter\"\nimages = [\"a\", \"b\"]\n";
    let config = Config::parse(&format!("[api]\nlisten = \"127.0.0.1:1\"\n{keys}[api.rates]\nrun_per_second = 3\nothers_per_second = 0\n")).unwrap();
    let roles: Vec<_> = config.api.keys.iter().map(|key| (key.id.as_str(), &key.role)).collect();
    let images = vec!["a".parse().unwrap(), "b".parse().unwrap()];
    assert_eq!(roles, [("A1", &KeyRole::Admin), ("A2", &KeyRole::Operator), ("A3", &KeyRole::TokenMinter { images })]);
    assert_eq!((config.api.rates.run, config.api.rates.others, config.api.rates.suspend), (Some(3), None, Some(50)));
    assert!(Config::defaults().api.keys.is_empty());
}

#[test]
fn roles_that_are_none_are_named_with_the_entry() {
    let found = problems(
        "[[api.keys]]\nid = \"A1\"\nrole = \"root\"\n[[api.keys]]\nrole = \"operator\"\nimage = 1\n[[api.keys]]\nid = \"A3\"\nrole = \"token-minter\"\n\
         [[api.keys]]\nid = \"A4\"\nrole = \"token-minter\"\nimages = [\"a b\"]\n[[api.keys]]\nid = \"A5\"\nrole = \"admin\"\nimages = [\"a\"]\n\
         [api.rates]\nrun_per_second = -1\nrun = 1\n",
    );
    let expected = [
        "api.keys[1].role: is \"root\", but must be \"admin\" or \"operator\" or \"token-minter\"",
        "api.keys[2].id: is missing; it must be an access key id",
        "api.keys[2].image: there is no such key; did you mean `images`?",
        "api.keys[3].images: is missing; it must be a list of one or more image names",
        "api.keys[4].images: is [\"a b\"], but must be a list of one or more image names",
        "api.keys[5].images: is of no use here: only the role \"token-minter\" is limited to images",
        "api.rates.run_per_second: is -1, but must be a whole number from 0 to 1000000",
        "api.rates.run: there is no such key; [api.rates] has ",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}");
    }
    let twice = problems("[[api.keys]]\nid = \"A1\"\nrole = \"admin\"\n[[api.keys]]\nid = \"A1\"\nrole = \"operator\"\n");
    assert_eq!(twice, ["api.keys: name the access key A1 twice"]);
    assert_eq!(problems("[api]\nkeys = 1\n"), ["api.keys: is integer, but must be sections [[api.keys]]"]);
    assert_eq!(problems("[api]\nkeys = [1]\nrates = 2\n").len(), 2);
}

from awqdist.cli.main import main

main()

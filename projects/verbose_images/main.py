from common import cli

if __name__ == "__main__":
  cli.run("verbose_images")
